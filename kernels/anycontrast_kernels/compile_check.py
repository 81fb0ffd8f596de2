"""Compile every Triton kernel we ship, for every chip, on a machine without a GPU, and look at it.

Triton's wheel carries the whole tool chain, so code for a chip can be made and read anywhere. For
each shipped configuration this checks what a launch would need: machine code exists, products of
16-bit numbers use the tensor cores, no register spills to memory, the shared memory fits the chip.
It says nothing about results or speed.

A kernel file ends with a list `COMPILE_CASES` of tuples (kernel, signature, constexprs, attrs,
options): the types of the run-time arguments by name, the compile-time arguments by name, the names
of the arguments a launch would find to be multiples of 16, and the compiler's options. An option
`capabilities` names the chips the case is for; without it, all of them.

Run it as `python -m anycontrast_kernels.compile_check` with any Triton from 3.6 on the path; it
prints a table and ends with 1 if a kernel fails. `--common` takes all for sm_90, and for the other
chips those that are neither float16 nor float32; `--processes` compiles several at a time.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNEL_FILES = "triton_*.py"
"""Files of this package that hold kernels."""

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Most shared memory one program may ask for."""

_TENSOR_CORE = {
    80: re.compile(r"\bmma\.sync"),
    90: re.compile(r"\bwgmma\.mma_async"),
    100: re.compile(r"\btcgen05\.mma|\bmma\.sync"),
}
_HALF_PRODUCT = re.compile(r"tt\.dot .*tensor<[0-9x]*x(?:f16|bf16)>")

CompileCase = tuple[Any, Mapping[str, str], Mapping[str, Any], Sequence[str], Mapping[str, Any]]
"""(kernel, signature, constexprs, attrs, options)."""


class Job(NamedTuple):
    """One case for one chip."""

    case: CompileCase
    capability: int

    @property
    def name(self) -> str:
        """Kernel, chip, types and compile-time arguments in one word."""
        kernel, _, constexprs, _, options = self.case
        values = [f"{key}={value}" for key, value in constexprs.items()]
        values += [f"{key}={options[key]}" for key in ("num_warps", "num_stages") if key in options]
        return "-".join([kernel.fn.__name__, f"sm{self.capability}", self.dtype, *values])

    @property
    def dtype(self) -> str:
        """The narrowest floating type among the arguments, or `int`."""
        types = {value.removeprefix("*") for value in self.case[1].values()}
        return next((dtype for dtype in ("bf16", "fp16", "fp32") if dtype in types), "int")

    @property
    def is_common(self) -> bool:
        """Whether `--common` takes it."""
        return self.capability == 90 or self.dtype not in ("fp16", "fp32")


@dataclass(frozen=True)
class Finding:
    """What the compiled code of one job looks like."""

    name: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    tensor_instructions: int
    problems: tuple[str, ...]
    """Empty if the kernel may ship."""


def jobs(cases: Sequence[CompileCase] | None = None) -> Iterator[Job]:
    """Yield every case for every chip it is for.

    Args:
        cases: default those of all `KERNEL_FILES`.
    """
    if cases is None:
        names = sorted(path.stem for path in Path(__file__).parent.glob(KERNEL_FILES))
        modules = [import_module(f"anycontrast_kernels.{name}") for name in names]
        cases = [case for module in modules for case in module.COMPILE_CASES]
    for case in cases:
        for capability in case[4].get("capabilities", CAPABILITIES):
            yield Job(case, capability)


def check(job: Job) -> Finding:
    """Compile one job and look at the result."""
    kernel, signature, constexprs, attrs, options = job.case
    names = kernel.arg_names
    places = {(names.index(name),): value for name, value in constexprs.items()}
    multiples: dict[tuple[int, ...], list[list[object]]] = {
        (names.index(name),): [["tt.divisibility", 16]] for name in attrs
    }
    types = {name: signature.get(name, "constexpr") for name in names}
    compiled = triton.compile(
        ASTSource(kernel, types, places, multiples),
        target=GPUTarget("cuda", job.capability, 32),
        options={key: value for key, value in options.items() if key != "capabilities"},
    )
    cubin = compiled.asm["cubin"]
    registers, stack, local = _resources(cubin)
    shared = int(compiled.metadata.shared)
    count = len(_TENSOR_CORE[job.capability].findall(compiled.asm["ptx"]))
    problems = []
    if _HALF_PRODUCT.search(compiled.asm["ttir"]) and count == 0:
        problems.append("16-bit products do not use the tensor cores")
    if job.capability == 90 and count and _is_serialized(cubin):
        problems.append("the assembler waits for every single tensor-core instruction")
    if stack or local:
        problems.append(f"spills: {stack} bytes of stack, {local} of local memory")
    if shared > SHARED_LIMIT_BYTES[job.capability]:
        problems.append(f"shared memory over {SHARED_LIMIT_BYTES[job.capability]} bytes")
    return Finding(job.name, registers, stack, local, shared, count, tuple(problems))


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread, bytes of stack, bytes of local memory."""
    text = _read_code(cubin, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]), int(found[3])


def _is_serialized(cubin: bytes) -> bool:
    """Whether as many waits as `wgmma` instructions are left: several should share one."""
    text = _read_code(cubin, "nvdisasm", "-c")
    return text.count("WARPGROUP.DEPBAR") >= text.count("HGMMA.")


def _read_code(cubin: bytes, tool: str, option: str) -> str:
    """What a tool of Triton's wheel prints about machine code."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _all_jobs() -> tuple[Job, ...]:
    return tuple(jobs())


def _check_at(index: int) -> Finding:
    """Check one of all jobs: a kernel cannot be handed to another process, its number can."""
    return check(_all_jobs()[index])


def _findings(chosen: Sequence[int], processes: int) -> Iterator[Finding]:
    """Check jobs given by number, in order."""
    if processes == 1:
        yield from map(_check_at, chosen)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_check_at, chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all kernels, or a selection of them; return the exit code."""
    parser = argparse.ArgumentParser(prog="anycontrast_kernels.compile_check", description=__doc__)
    parser.add_argument("match", nargs="*", help="only kernels whose name contains all of these")
    parser.add_argument("--common", action="store_true", help="sm_90, and elsewhere bfloat16")
    parser.add_argument("--processes", type=int, default=1, help="kernels compiled at a time")
    given = parser.parse_args(arguments)
    chosen = [
        index
        for index, job in enumerate(_all_jobs())
        if all(text in job.name for text in given.match) and (job.is_common or not given.common)
    ]
    out = sys.stdout
    out.write(f"triton {triton.__version__}: {len(chosen)} of {len(_all_jobs())} kernels\n")
    out.write("regs stack local shared tensor  kernel\n")
    num_failed = 0
    for found in _findings(chosen, given.processes):
        num_failed += bool(found.problems)
        verdict = f"  FAILED: {'; '.join(found.problems)}" if found.problems else ""
        out.write(
            f"{found.registers:4} {found.stack_bytes:5} {found.local_bytes:5} "
            f"{found.shared_bytes:6} {found.tensor_instructions:6}  {found.name}{verdict}\n"
        )
        out.flush()
    out.write(f"{len(chosen) - num_failed} fit, {num_failed} do not\n")
    return 1 if num_failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
