"""What a machine is told to join by."""

import sys
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ipv6 import needs_ipv6
from uellm.cli.tree import Progress
from uellm.core.errors import ConfigurationError
from uellm.mesh.joining import JoinOptions, Token, address_towards, new_secret


@given(st.integers(1, 65535))
def test_a_token_says_port_and_password(port: int) -> None:
    token = Token(port, new_secret())
    assert Token.parse(str(token)) == token
    assert JoinOptions("box", token).redis_url == f"redis://:{token.secret}@box:{port}/0"
    for host in ("::1", "[::1]"):
        assert JoinOptions(host, token).redis_url == f"redis://:{token.secret}@[::1]:{port}/0"


@given(st.text(max_size=60))
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="copy the whole line"):
        Token.parse(text)


def test_a_token_that_lost_its_end_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="copy the whole line"):
        Token.parse(str(Token(6379, new_secret()))[:-3])


def test_workers_are_told_where_the_mesh_is_and_not_in_their_command(tmp_path: Path) -> None:
    token = Token(7000, new_secret())
    options = JoinOptions("box", token, workers=2, devices="cpu")
    one, other = options.services("10.0.0.2", tmp_path, {"UELLM_LOG_LEVEL": "debug"})
    assert one.service_id != other.service_id
    assert token.secret not in " ".join(one.command)
    assert one.environment["UELLM_REDIS_URL"] == options.redis_url
    assert one.environment["UELLM_HOST"] == "10.0.0.2"
    assert one.environment["UELLM_WORKER_DEVICES"] == "cpu"
    assert one.environment["UELLM_LOG_LEVEL"] == "debug"


def test_the_address_towards_a_host_is_one_of_this_machine() -> None:
    assert address_towards("127.0.0.1", 9) == "127.0.0.1"
    with pytest.raises(ConfigurationError, match="no way leads to"):
        address_towards("no-such-host.invalid", 9)


@needs_ipv6
def test_the_address_towards_a_host_may_be_of_ipv6() -> None:
    assert address_towards("[::1]", 9) == "::1"


@pytest.mark.parametrize("host", ["", "box:6379", "[::1]:6379", "redis://box", "a b", "me@box"])
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    token = Token(7000, new_secret())
    with pytest.raises(ConfigurationError, match="no name or address of a machine"):
        JoinOptions(host, token)
    if host:
        with pytest.raises(ConfigurationError, match="--address: "):
            JoinOptions("box", token, address=host)


def test_how_to_join_stays_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said next takes the place of what was being waited for, but not of this."""

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress()
    progress("starting Redis")
    progress.note(line := f"other machines join by: uellm join box --token {'x' * 200}")
    progress("demo: waits for devices")
    progress.done()
    assert f"{line}\n" in terminal.getvalue()
