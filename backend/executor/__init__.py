"""Programs on one event loop: the same `@sgl.function` objects, a greenlet in place of every thread."""

from weft.backend.executor.admission import Need, declare
from weft.backend.executor.attempts import Attempts
from weft.backend.executor.base import Cost, Limits, Piece, Price, ProgramError, Took
from weft.backend.executor.branches import Branch
from weft.backend.executor.executor import ProgramExecutor, Run
from weft.backend.executor.stalls import Stall
from weft.backend.executor.state import State
from weft.backend.executor.tools import Retry, Tool, ToolError, tool
from weft.backend.executor.turns import Toolbox, Turn

__all__ = [
    "Attempts",
    "Branch",
    "Cost",
    "Limits",
    "Need",
    "Piece",
    "Price",
    "ProgramError",
    "ProgramExecutor",
    "Retry",
    "Run",
    "Stall",
    "State",
    "Took",
    "Tool",
    "ToolError",
    "Toolbox",
    "Turn",
    "declare",
    "tool",
]
