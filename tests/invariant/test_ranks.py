"""Several processes are one: the same steps, losses and adapters at any number of ranks, started by any means."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from preftree.cli import main_train
from tests.support.command import command, history, losses, ranked_rows, write_inputs, write_rows
from tests.support.ranks import ROOT, as_srun, as_torchrun, finish, said, start, together

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:accelerate.*")

#: 24 pairs, 19 to train on: three steps of 6 and one of a single pair, of which all ranks but one get none.
STEPS, PAIRS, BATCH = 12, 24, 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), pairs=PAIRS)


def flags(inputs: Path, output: Path, ranks: int, **more: object) -> list[str]:
    """A global batch of 6 pairs, however many ranks there are."""
    settings = {
        "per_device_train_batch_size": BATCH // ranks,
        "max_steps": STEPS,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 6,
        **more,
    }
    return command(inputs, output, **settings)


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the run on one rank."""
    output = tmp_path_factory.mktemp("alone") / "O"
    assert main_train(flags(inputs, output, 1)) == 0
    return output


def assert_same_run(found: Path, expected: Path) -> None:
    """Losses, what is logged of pairs, and adapters."""
    assert losses(found) == pytest.approx(losses(expected), abs=1e-6)
    compared = ("rewards/", "logps/", "eval_loss", "eval_rewards", "eval_logps", "grad_norm", "epoch")
    for one, other in zip(history(found), history(expected), strict=True):
        for name, value in other.items():
            tie = name.endswith("accuracies") and other["step"] == 1  # policy and reference are one; rounding decides
            if name.startswith(compared) and not tie:
                assert one[name] == pytest.approx(value, abs=2e-5), name
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    assert max(float(weight.abs().max()) for name, weight in ours.items() if "lora_B" in name) > 1e-3


def test_two_ranks_are_one(inputs: Path, alone: Path, tmp_path: Path) -> None:
    assert [record["epoch"] for record in history(alone) if "loss" in record][3::4] == [1, 2, 3]
    printed = together(flags(inputs, tmp_path / "O", 2), 2, tmp_path)
    assert "ranks      2" in printed
    assert_same_run(tmp_path / "O", alone)


@pytest.mark.parametrize("loss", ["listwise", "listwise aot"])
def test_ranked_lists_on_two_ranks(inputs: Path, tmp_path: Path, loss: str) -> None:
    """Lists of 2 to 5 answers, steps of 6 lists and of a single one; with `aot` the ranks exchange their tables."""
    lists = write_rows(tmp_path / "lists.jsonl", ranked_rows(9))
    more = {"dataset_name": lists, "loss_type": loss, "max_steps": 4, "eval_steps": 4}
    more["adam_epsilon"] = 1e-4  # Adam makes whole steps of gradients that are rounding
    assert main_train(flags(inputs, tmp_path / "alone", 1, **more)) == 0
    records = [record for record in history(tmp_path / "alone") if "loss" in record]
    assert [record["epoch"] for record in records][1::2] == [1, 2]
    assert all("rewards/rank_accuracies" in record for record in records)
    together(flags(inputs, tmp_path / "O", 2, **more), 2, tmp_path)
    assert_same_run(tmp_path / "O", tmp_path / "alone")


def test_srun(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """By the variables that it sets, none of which is torch's."""
    printed = together(flags(inputs, tmp_path / "O", 2, max_memory="4GB"), 2, tmp_path, as_srun)
    assert "ranks      2" in printed
    assert "--max_memory leaves" in printed
    assert_same_run(tmp_path / "O", alone)


def test_a_batch_script_is_no_rank(inputs: Path, tmp_path: Path) -> None:
    """In a Slurm job with places for two tasks, not started by srun: it does not wait for others, and says so."""
    printed = together(flags(inputs, tmp_path / "O", 1, max_steps=1), 1, tmp_path, lambda *_: {"SLURM_NTASKS": "2"})
    assert "2 tasks, and this process trains alone" in printed
    assert "ranks      " not in printed


@pytest.mark.long
def test_mpirun(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """The launcher itself, which sets its own variables and none of torch's."""
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not here: apt-get install openmpi-bin")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    launch = [sys.executable, "gaudi_spawn.py", "--world_size", "2", "--use_mpi", "dpo_clm.py"]
    done = subprocess.run(
        [*launch, *flags(inputs, tmp_path / "O", 2)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "O", alone)


def test_a_base_model_shared_out_is_the_same_model(inputs: Path, alone: Path, tmp_path: Path) -> None:
    printed = together([*flags(inputs, tmp_path / "O", 2, tokens_per_forest=40), "--fsdp"], 2, tmp_path)
    assert "units 2 LlamaDecoderLayer" in printed
    assert_same_run(tmp_path / "O", alone)


def test_three_hosts_of_which_one_is_lost(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """The others stop with a word about it; all three go on from the last checkpoint to the same end."""
    words = flags(inputs, tmp_path / "O", 3)
    codes = finish(start(words, 3, tmp_path / "lost", lose={"LOSE_AT": "7", "LOSE_BY": "SIGKILL"}))
    assert codes == [2, 2, -9]
    for printed in said(tmp_path / "lost", 3)[:2]:
        assert "another rank was lost" in printed
        assert "--resume_from_checkpoint true" in printed
        assert "Traceback" not in printed
    assert (tmp_path / "O" / "checkpoint-4").is_dir()
    together([*words, "--resume_from_checkpoint", "true"], 3, tmp_path / "resumed")
    assert_same_run(tmp_path / "O", alone)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)], ids=["one, then two", "two, then one"])
def test_a_run_goes_on_with_another_number_of_ranks(
    inputs: Path, alone: Path, tmp_path: Path, before: int, after: int
) -> None:
    """The pairs of a step are the same, so it is the same run; only sums are rounded otherwise."""
    output = tmp_path / "O"
    finish(start(flags(inputs, output, before), before, tmp_path / "lost", lose={"LOSE_AT": "7", "LOSE_BY": "SIGKILL"}))
    printed = together(flags(inputs, output, after), after, tmp_path / "resumed")
    assert f"resume     from {output / 'checkpoint-4'}" in printed
    assert_same_run(output, alone)


def test_more_pairs_per_step_on_two_ranks_are_another_run(inputs: Path, tmp_path: Path) -> None:
    words = flags(inputs, tmp_path / "O", 1)
    finish(start(words, 1, tmp_path / "lost", lose={"LOSE_AT": "7", "LOSE_BY": "SIGKILL"}))
    before = (tmp_path / "O" / "run" / "metrics.jsonl").read_bytes()
    assert finish(start(words, 2, tmp_path / "resumed")) == [2, 2]
    printed = said(tmp_path / "resumed", 2)
    assert "pairs per step was 6, now 12" in printed[0]
    assert "Traceback" not in "".join(printed)
    assert (tmp_path / "O" / "run" / "metrics.jsonl").read_bytes() == before


def test_a_rank_that_hangs(inputs: Path, tmp_path: Path) -> None:
    """It is waited for as long as --ddp_timeout says, and no longer."""
    words = flags(inputs, tmp_path / "O", 2, ddp_timeout=3)
    ranks = start(words, 2, tmp_path, lose={"LOSE_AT": "3", "LOSE_BY": "SIGSTOP"})
    assert finish(ranks[:1]) == [2]
    finish(ranks[1:], timeout=0)  # it does not end by itself, nor by SIGTERM
    assert "did not answer within --ddp_timeout" in said(tmp_path, 1)[0]


def test_a_rank_that_never_comes(inputs: Path, tmp_path: Path) -> None:
    """Rank 1 of 2, alone; what it says it says though it is not rank 0."""
    words = flags(inputs, tmp_path / "O", 2, ddp_timeout=1)
    codes = finish(start(words, 1, tmp_path, launcher=lambda _, __: as_torchrun(1, 2)), timeout=60)
    assert codes == [2]
    printed = said(tmp_path, 1)[0]
    assert "rank 0 did not come to 127.0.0.1:" in printed
    assert "within 1 s (Connection refused)" in printed
    assert "Traceback" not in printed
