"""Triton kernels are compiled for chips that are not here, and the machine code looked at.

The default run takes a few, the slow one every kernel and chip for the common types;
`python -m anycontrast_kernels.compile_check` takes all there are, with any Triton on the path.
"""

import pytest

pytest.importorskip("triton")

from anycontrast_kernels import compile_check

# What shows most: forward and backward for the chip before the newest.
QUICK = (
    "forward_kernel-sm90-bf16-HEAD_DIM=64-",
    "dkdv_kernel-sm90-bf16-HEAD_DIM=128-",
)
# Attention: the head dims 32 and 96 and the other types are left to the module itself.
LEFT_OUT = ("HEAD_DIM=32-", "HEAD_DIM=96-", "-fp16-HEAD_DIM", "-fp32-HEAD_DIM")
ALL = list(compile_check.jobs())


def quick_jobs() -> list[compile_check.Job]:
    return [job for job in ALL if job.name.startswith(QUICK)]


def slow_jobs() -> list[compile_check.Job]:
    chosen = [job for job in ALL if not any(text in job.name for text in LEFT_OUT)]
    return [job for job in chosen if job not in quick_jobs()]


def test_the_quick_selection_names_kernels_there_are() -> None:
    assert len(quick_jobs()) == len(QUICK)


@pytest.mark.parametrize("job", quick_jobs(), ids=lambda job: job.name)
def test_compiles_to_what_a_launch_needs(job: compile_check.Job) -> None:
    found = compile_check.check(job)
    assert not found.problems
    assert found.tensor_instructions > 0


@pytest.mark.slow
@pytest.mark.parametrize("job", slow_jobs(), ids=lambda job: job.name)
def test_every_shipped_kernel_compiles_to_what_a_launch_needs(job: compile_check.Job) -> None:
    assert not compile_check.check(job).problems


def test_a_kernel_that_does_not_fit_is_told() -> None:
    """Few registers and a deep pipeline: both are refused."""
    job = next(job for job in ALL if "forward_kernel-sm80-bf16-HEAD_DIM=32-" in job.name)
    *case, options = job.case
    options = {**options, "num_stages": 24, "maxnreg": 64}
    problems = " ".join(compile_check.check(compile_check.Job((*case, options), 80)).problems)
    assert "shared memory over 166912 bytes" in problems
    assert "spills" in problems


def test_every_kernel_has_a_name_of_its_own() -> None:
    assert len({job.name for job in ALL}) == len(ALL)


def test_a_selection_is_told_and_an_empty_one_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_check.main([QUICK[0], "--common"]) == 0
    assert f"1 of {len(ALL)} kernels" in capsys.readouterr().out
    assert compile_check.main(["forward_kernel-sm80-fp16", "--common"]) == 1
    assert f"0 of {len(ALL)} kernels" in capsys.readouterr().out
