"""The command line. `uellm --help` imports neither gRPC nor any model library."""


def main() -> None:
    """Run the command that the arguments name."""
    try:
        from uellm.cli.app import app

        app()
    except KeyboardInterrupt:  # While there is no command yet that would end in its own way.
        raise SystemExit(130) from None
    except Exception as error:  # A fault of ours: one line for people, the rest in a file.
        from uellm.cli.exits import report_fault

        raise SystemExit(report_fault(error)) from None
