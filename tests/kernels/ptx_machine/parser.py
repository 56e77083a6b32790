"""PTX text to a ``Kernel``: segments of steps, cut where threads may part or have to wait."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .instruction import Instruction, PtxError

if TYPE_CHECKING:
    from .run import Run

Step = Callable[["Run", Any], None]

# What a body consists of; what is between matches is white space and comments.
_TOKEN = re.compile(
    r"\.(?:loc|file|section)\b[^\n]*?(?://\s*(?P<location>\S+)[^\n]*)?\n"
    r"|//[^\n]*"
    r"|(?P<label>[$\w]+):(?!:)"
    r"|(?P<open>\{)"
    r"|(?P<close>\})"
    r"|(?P<statement>[.@$%\w][^;]*);"
)
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


@dataclass
class Segment:
    """Steps up to the next label, branch or barrier.

    ``end``: "next", "branch", "return" or "barrier"; ``target`` the label of a branch, later its segment; ``guard``
    what threads must have to take it, None for all.
    """

    steps: list[Step] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    opcodes: Counter[str] = field(default_factory=Counter)
    end: str = "next"
    target: Any = None
    guard: Callable[["Run"], Any] | None = None


class Kernel:
    """A parsed kernel.

    ``parameters``: (type, name) in order.  ``threads`` of a CTA.  ``kinds``: type of each register.  ``local``: bytes
    of stack of a thread.  ``grain``: the narrowest access to each memory, in bytes, at most 16.
    """

    def __init__(self, text: str, compile_step: Callable[[Instruction], Step]) -> None:
        _, entry, rest = text.partition(".visible .entry ")
        if not entry:
            raise PtxError("no .visible .entry in the text; give the PTX of a kernel.")
        parameters, _, body = rest.partition(")")
        self.name = parameters.partition("(")[0].strip()
        self.parameters = re.findall(r"\.param \.(\w+).*?(\w+)\s*(?:,|$)", parameters.partition("(")[2], re.MULTILINE)
        sizes = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", body)
        if sizes is None:
            raise PtxError(f"{self.name} does not say how many threads a program has (.reqntid).")
        self.threads = math.prod(map(int, sizes[1].split(",")))
        self.kinds: list[str] = []
        self.local = 0
        self.grain = {"global": 16, "shared": 16, "local": 1}
        self.segments = [Segment()]
        self._compile_step = compile_step
        self._scopes: list[dict[str, int]] = [{}]
        self._labels: dict[str, int] = {}
        self._parse(body[body.index("{") + 1 :])
        for segment in self.segments:
            if segment.end == "branch":
                segment.target = self._labels[segment.target]

    def register(self, name: str) -> int:
        """Number of the register ``name`` in the innermost scope that has one."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise PtxError(f"{self.name} has no register {name}.")

    def _parse(self, body: str) -> None:
        location = ""
        for token in _TOKEN.finditer(body):
            if token["location"]:
                location = token["location"]
            elif token["label"]:
                if self.segments[-1].steps:
                    self.segments.append(Segment())
                self._labels[token["label"]] = len(self.segments) - 1
            elif token["open"]:
                self._scopes.append({})
            elif token["close"]:
                self._scopes.pop()
                if not self._scopes:
                    return
            elif token["statement"]:
                self._statement(" ".join(token["statement"].split()), location)

    def _statement(self, text: str, location: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in _registers(names):
                self._scopes[-1][name] = len(self.kinds)
                self.kinds.append(kind[1:])
        elif text.startswith(".local"):
            self.local = int(re.findall(r"\[(\d+)\]", text)[0])
        elif not text.startswith(".pragma"):
            self._instruction(text, location)

    def _instruction(self, text: str, location: str) -> None:
        where = f"{self.name}: {text} @ {location}"
        guard = None
        if condition := re.match(r"@(!?)(\S+)\s+", text):
            guard = self._guard(self.register(condition[2]), bool(condition[1]))
            text = text[condition.end() :]
        opcode, _, rest = text.partition(" ")
        operands = [operand.strip() for operand in _OPERAND.findall(rest) if operand.strip()]
        segment, name = self.segments[-1], opcode.partition(".")[0]
        segment.opcodes[opcode] += 1
        if name == "bra":
            self._end("branch", operands[0], guard)
        elif name in ("ret", "exit"):
            self._end("return", None, guard)
        elif opcode.startswith(("bar.sync", "barrier.sync")):
            if operands != ["0"] or guard:
                raise PtxError(f"barriers of a part of the threads are not implemented: {where}")
            self._end("barrier")
        else:
            step = self._compile_step(Instruction(self, opcode, operands, where))
            segment.steps.append(step if guard is None else _guarded(step, guard))
            segment.places.append(where)

    def _end(self, end: str, target: str | None = None, guard: Callable[["Run"], Any] | None = None) -> None:
        segment = self.segments[-1]
        segment.end, segment.target, segment.guard = end, target, guard
        self.segments.append(Segment())

    @staticmethod
    def _guard(register: int, negated: bool) -> Callable[["Run"], Any]:
        if negated:
            return lambda run: ~run.registers[register]
        return lambda run: run.registers[register]


def _registers(names: str) -> Iterator[str]:
    """Of a declaration: ``%r<3>`` stands for %r0, %r1 and %r2."""
    for name in names.split(","):
        if counted := re.match(r"\s*(%\w+)<(\d+)>", name):
            yield from (f"{counted[1]}{i}" for i in range(int(counted[2])))
        else:
            yield name.strip()


def _guarded(step: Step, guard: Callable[["Run"], Any]) -> Step:
    return lambda run, active: step(run, guard(run) if active is None else guard(run) & active)
