"""The commands, put together."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from uellm.cli import (
    asking,
    deploying,
    exits,
    looking,
    plan,
    policy,
    profiler,
    recorded,
    serving,
    simulate,
    verify,
)
from uellm.core.errors import UellmError


class _Commands(TyperGroup):
    """Errors of the mesh end a command with one line and a status of their own."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UellmError as error:
            raise typer.Exit(exits.complain(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(exits.INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    name="uellm",
    help="An LLM serving mesh that tells you when your answer will be ready, and keeps its word.",
    epilog="Exit status: 0 well; 1 failed; 2 wrong usage or configuration; 3 no mesh answers; "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Run": (serving.demo, serving.up, serving.join, serving.serve),
    "Deploy": (deploying.deploy, deploying.undeploy, deploying.status),
    "Ask": (asking.generate, asking.estimate, asking.chat, asking.cancel),
    "Look": (
        looking.models,
        looking.health,
        looking.topology,
        plan.plan,
        verify.verify,
        looking.version,
    ),
    "Explain": (recorded.why, recorded.decisions, recorded.replay),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
app.add_typer(simulate.app, name="simulate", rich_help_panel="Look")
app.add_typer(profiler.app, name="profiler", rich_help_panel="Look")
app.add_typer(policy.app, name="policy", rich_help_panel="Run")
