"""The command `convergence` in the process of a test."""

from convergence import command


def main(arguments: list[str]) -> None:
    """Run `convergence` with these arguments. Raises SystemExit unless its exit code is 0."""
    try:
        command.main([str(argument) for argument in arguments], prog_name="convergence")
    except SystemExit as end:
        if end.code:
            raise
