"""What the arguments of the examples share: help that shows defaults, checkpoints that are looked for at once, a folder
for the output that git does not see."""

import argparse
import pathlib

from .checkpoint import given

__all__ = ["argument_parser"]


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        unsaid = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        shown = not unsaid and "default" not in text  # 0 equals False, and is shown
        return f"{text} (default: %(default)s)" if shown else text


def argument_parser(
    description: str, name: str, checkpoint: str = "", training: bool = False
) -> argparse.ArgumentParser:
    """With --output, --checkpoint where that says of what, and those of `training`. The others are the example's own,
    each with a help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    if checkpoint:
        text = f"folder or name of {checkpoint}; default: all-MiniLM-L6-v2"
        parser.add_argument("--checkpoint", type=given, help=text)
    folder = pathlib.Path("example_output") / name
    parser.add_argument("--output", type=pathlib.Path, default=folder, help="folder for what is saved")
    if training:
        from .training import add_training_arguments

        add_training_arguments(parser)
    return parser
