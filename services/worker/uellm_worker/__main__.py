"""Runs a worker: ``python -m uellm_worker``."""

from uellm.service import main
from uellm_worker.app import start
from uellm_worker.settings import WorkerSettings

if __name__ == "__main__":
    main(WorkerSettings, start)
