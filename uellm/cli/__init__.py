"""The command line. `uellm --help` imports neither gRPC nor any model library."""


def main() -> None:
    """Run the command that the arguments name."""
    from uellm.cli.app import app

    try:
        app()
    except Exception as error:  # A fault of ours: one line for people, the rest in a file.
        from uellm.cli.exits import report_fault

        raise SystemExit(report_fault(error)) from None
