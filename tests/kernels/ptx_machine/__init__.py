"""A machine that runs PTX: the code that Triton compiles for an NVIDIA GPU, thread by thread, in NumPy.

    machine = Machine()
    with running_on(machine, arch=80):            # Triton's launches on CPU tensors go to the machine
        out = paged_attention_triton(...)
    machine.check()                               # raises what was found
    machine.launches                              # instructions by opcode, bytes read and written

How it works.  ``driver.py`` is the GPU that Triton drives: it compiles for the target that the driver names, and
whoever launches a compiled kernel launches it here.  ``parser.py`` turns the text into segments of steps, one closure
for each instruction (``instruction.py`` has its operands; ``arithmetic.py``, ``moves.py``, ``access.py``, ``warps.py``,
``matrices.py`` and ``wgmma.py`` what it does, each with a table of opcodes and the modifiers they understand).
``run.py`` runs many CTAs (Triton's programs) together: a register is one vector over all their threads, and threads
that branches part are masked.  ``memory.py`` knows of every byte who touched it, and ``machine.py`` puts tensors into
that memory, apart from each other, and back.

What it finds.  Accesses out of the elements of a tensor or misaligned; reads of what nobody wrote, or of what the
caller has forbidden (``Machine.forbid``; what is allocated inside of ``running_on`` is); races in shared memory between
barriers, in global memory also between CTAs; copies used before their wait; barriers that not all threads reach.  An
instruction that it does not know is refused by name: ``PtxError``.

Numbers.  Integers, conversions, and arithmetic of floats are right to the bit, fp16 subnormals included.  Products of
matrices are exact, summed in float64 and rounded once, where a tensor core rounds on the way; ``ex2``, ``lg2`` and
others that a GPU approximates are right to the last bit.

What it cannot show.  What the assembler (ptxas) makes of the PTX: registers, spills, the order within a thread.  Fences
between ``wgmma`` and ordinary stores, and memory models weaker than "every access is seen at once".  tcgen05 and TMA
(not implemented), time, and GPUs of AMD.
"""

from .driver import running_on
from .instruction import PtxError
from .machine import FoundError, Launch, Machine

__all__ = ["FoundError", "Launch", "Machine", "PtxError", "running_on"]
