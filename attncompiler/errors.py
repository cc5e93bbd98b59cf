"""Every error that a user of attncompiler can meet: what, where (the user's line), why, and what to do."""

from __future__ import annotations


class AttnCompilerError(Exception):
    """Base of all errors of this package.

    `what` names the mistake in one sentence, `where` is "file.py:41" or "" when no line is to blame, `why` gives the
    reason and `do` the remedy; the message shows all that are not empty.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        lines = [what if not where else f"{what} (at {where})"]
        lines += [f"  why: {why}"] if why else []
        lines += [f"  do:  {do}"] if do else []
        super().__init__("\n".join(lines))

    @property
    def reason(self) -> str:
        """What and why in one line."""
        return f"{self.what}: {self.why}" if self.why else self.what


class OptionError(AttnCompilerError):
    """An option that does not exist, or one that contradicts another."""


class DeviceError(AttnCompilerError):
    """Operands on different devices, or a device that is not there."""


class UnsupportedProgram(AttnCompilerError):
    """A valid program that the chosen lowering has no kernel for."""


class ParseError(AttnCompilerError):
    """Text that is not a program of the language."""


class InvalidProgram(AttnCompilerError):
    """A program that breaks an invariant of the language."""


class Unrecognised(AttnCompilerError):
    """A piece of the user's graph that is not proved equal to a clause form; it is left to Inductor."""
