"""Arguments that the examples share: help with defaults, checkpoints that are located at once, an output folder that
git ignores."""

import argparse
import pathlib

from .checkpoint import CheckpointMissing, given, locate

__all__ = ["argument_parser"]


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        unsaid = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        shown = not unsaid and "default" not in text  # 0 equals False, but is shown
        return f"{text} (default: %(default)s)" if shown else text


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, *args, **kwargs):
        found, rest = super().parse_known_args(*args, **kwargs)
        if getattr(found, "checkpoint", "") is None:
            try:
                locate()
            except CheckpointMissing as error:
                self.error(f"--checkpoint: none is given, and {error}")
        return found, rest


def argument_parser(
    description: str, name: str, checkpoint: str = "", training: bool = False
) -> argparse.ArgumentParser:
    """A parser with --output, with --checkpoint if `checkpoint` describes it, and with the arguments of `training`. An
    example adds its own, each with a help text."""
    parser = _Parser(description=description, formatter_class=_Help)
    if checkpoint:
        text = f"folder or name of {checkpoint}; default: all-MiniLM-L6-v2"
        parser.add_argument("--checkpoint", type=given, help=text)
    folder = pathlib.Path("example_output") / name
    parser.add_argument("--output", type=pathlib.Path, default=folder, help="folder for what is saved")
    if training:
        from .training import add_training_arguments

        add_training_arguments(parser)
    return parser
