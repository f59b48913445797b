# One service: docker build --build-arg ROLE=worker .   Roles: gateway, profiler, scheduler, deployer, worker.

FROM python:3.11-slim AS code
# Options of pip: an index of one's own, or of a torch without CUDA, which saves gigabytes.
ARG PIP_ARGS=""
COPY . /src
RUN pip install --no-cache-dir ${PIP_ARGS} --no-deps --prefix /code /src

FROM python:3.11-slim
ARG PIP_ARGS=""
RUN useradd --create-home uellm
# What is needed, before the code: a change of code builds none of it anew. All roles share a layer.
WORKDIR /src
COPY pyproject.toml LICENSE ./
COPY uellm/__init__.py uellm/
RUN touch README.md && pip install --no-cache-dir ${PIP_ARGS} .
ARG ROLE
RUN pip install --no-cache-dir ${PIP_ARGS} ".[${ROLE:?--build-arg ROLE=... names the service}]"
COPY --from=code /code /usr/local

USER uellm
WORKDIR /home/uellm
EXPOSE 50051
ENV ROLE=${ROLE}
CMD ["sh", "-c", "exec uellm serve \"$ROLE\""]
