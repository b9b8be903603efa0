"""The scripts in processes of their own: through ``accelerate launch``, two at a time, with loader workers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from inputs import write_shuffled_dataset
from runs import SCRIPTS, TOKEN, arguments, run, trainers  # noqa: F401  (a fixture)
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import save_folder
from torch.distributed import run as distributed
from warm_processes import WarmProcess

from library.support import processes
from library.training.state import TrainingState

ROOT = Path(__file__).parents[2]


# What torch says of a port that another program listens to.
TAKEN = "EADDRINUSE"


def free_port() -> int:
    """A port of this machine that nothing listened to a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


Ended = tuple[int, str, str]


def on_a_free_port(begin: Callable[[int], list[Ended]]) -> list[Ended]:
    """What ``begin`` gives for a free port; anew where another program took it between its being found and used."""
    for _ in range(5):
        done = begin(free_port())
        if not any(TAKEN in errors for _, _, errors in done):
            break
    return done


def two_nodes(argv: list[str], folder: Path) -> list[Ended]:
    """Run the script of SD models as two nodes of one process each, as two machines would: each has its launcher.

    Exit code, standard output and errors of each.
    """

    def begin(port: int) -> list[Ended]:
        launcher = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
        given = [[*launcher, f"--node_rank={rank}", SCRIPTS["sd1"].__file__, *argv] for rank in (0, 1)]
        return _both(folder, Path(distributed.__file__), given, [launchers_environment()] * 2)

    return on_a_free_port(begin)


def launchers_environment() -> dict[str, str]:
    """For a launcher of processes on the CPU, a thread each."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def two_processes(file: Path, argv: list[str], folder: Path, **environment: str) -> list[Ended]:
    """Run the file in two processes that no launcher watches: exit code, standard output and errors of each.

    ``folder`` is for what they print.
    """
    return on_a_free_port(lambda port: _two_processes(file, argv, folder, port, environment))


def one_run(file: Path | str, argv: list[str], folder: Path) -> str:
    """Run the file in two processes of one run on the CPU, which must end well; the first one's standard output."""
    done = two_processes(Path(file), argv, folder, ACCELERATE_USE_CPU="true")
    assert [code for code, _, _ in done] == [0, 0], done
    return done[0][1]


def _two_processes(file: Path, argv: list[str], folder: Path, port: int, environment: dict) -> list[Ended]:
    common = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "ACCELERATE_USE_CPU" not in environment:
        del common["ACCELERATE_USE_CPU"]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return _both(folder, file, [argv] * 2, [{**common, **each} for each in ranks])


def _both(folder: Path, file: Path, given: list[list[str]], environments: list[dict]) -> list[Ended]:
    """Run a file twice at a time, and wait for both."""
    begun = []
    try:
        for number, (argv, environment) in enumerate(zip(given, environments, strict=True)):
            begun.append(WarmProcess(folder, number, file, argv, environment))
        first = begun[0].ended(300)
        if TAKEN in first[2]:  # the other would wait for a partner that listens to another program's port
            begun[1].kill()
        return [first, begun[1].ended(300)]
    finally:
        for each in begun:
            each.kill()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five photographs in batches of one: with two processes the last step has an empty batch."""
    folder = tmp_path_factory.mktemp("data")
    file = write_shuffled_dataset(folder)
    file.write_text(file.read_text().replace("batch_size = 2", "batch_size = 1"))
    return file


def assert_moved_alike(one, two, starts):
    """Both are the same up to 5 % of how far they went: processors order sums differently, and steps build on steps."""
    for first, second, start in zip(one, two, starts, strict=True):
        assert (first - start).norm() > 0
        assert (first - second).norm() < 0.05 * (first - start).norm()


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("sd2", []),
        ("sdxl", []),
        ("sdxl", ["--normalize_sample_gradients"]),
        ("sd1", ["--train_inpainting", "--cache_latents=false"]),
    ],
)
def test_two_processes_equal_one_with_accumulation(family, flags, dataset, tmp_path, trainers):  # noqa: F811
    model = save_folder(family, tmp_path / "model", channels=9 if "--train_inpainting" in flags else 4)
    more = [*flags, "--max_train_steps=3", "--num_vectors_per_token=2", "--optimizer_type=SGD", "--learning_rate=0.01"]
    alone = arguments(family, model, dataset, tmp_path / "one", *more, "--gradient_accumulation_steps=2")
    assert run(family, alone) == 0
    argv = arguments(family, model, dataset, tmp_path / "two", *more)
    said = one_run(SCRIPTS[family].__file__, argv, tmp_path)
    one, two = (load_file(tmp_path / name / f"{TOKEN}.safetensors") for name in ("one", "two"))
    assert said.count("The embedding is in") == 1
    keys = trainers[0].job.family.embedding_keys
    assert_moved_alike([one[key] for key in keys], [two[key] for key in keys], trainers[0].setup.starts)


def test_two_nodes_equal_one_process_with_accumulation(dataset, tmp_path, tiny_sd2, trainers):  # noqa: F811
    more = ["--max_train_steps=5", "--num_vectors_per_token=2", "--optimizer_type=SGD", "--learning_rate=0.01"]
    alone = arguments("sd2", tiny_sd2, dataset, tmp_path / "one", *more, "--gradient_accumulation_steps=2")
    assert run("sd2", alone) == 0
    argv = arguments("sd2", tiny_sd2, dataset, tmp_path / "two", *more)
    (first, out, errors), (second, silence, more_errors) = two_nodes(argv, tmp_path)
    assert (first, second) == (0, 0), errors + more_errors
    assert "2 processes" in errors
    assert (out.count("The embedding is in"), silence) == (1, "")
    one, two = (load_file(tmp_path / name / f"{TOKEN}.safetensors")["emb_params"] for name in ("one", "two"))
    assert_moved_alike([one], [two], trainers[0].setup.starts)


def test_images_of_all_processes_reach_the_trackers_and_the_report(dataset, tmp_path, tiny_sd1):
    """Each draws its share; the numbers of the report are those of one process."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{TOKEN} {number} --w 64 --h 64 --s 2 --d {number}" for number in range(3)))
    quick = "from library.output import learning_report as report\nreport.PICTURES, report._STEPS = 4, 2\n"
    quick += "report._LOSS_SAMPLES = 8\n"
    drawn = f"from library.output.sampling import SamplingPipeline\noriginal = SamplingPipeline.draw\n{COUNTING}"
    file = script(tmp_path, quick + drawn.format(folder=str(tmp_path)))
    reports = []
    for folder, count in (("one", 1), ("two", 2)):
        argv = arguments("sd1", tiny_sd1, dataset, tmp_path / folder, "--learning_report", "--max_train_steps=1")
        argv += ["--no_report=false"]
        argv += [f"--sample_prompts={prompts}", "--sample_at_first", f"--logging_dir={tmp_path / folder / 'logs'}"]
        if count == 1:
            alone = WarmProcess(tmp_path, 0, file, argv, {**os.environ, "RANK": "0", "WORLD_SIZE": "1"})
            code, said, errors = alone.ended(300)
            assert code == 0, errors
        else:
            said = one_run(file, argv, tmp_path)
        (events,) = {path.parent for path in (tmp_path / folder / "logs").rglob("events*")}
        reader = EventAccumulator(str(events)).Reload()
        assert sorted(reader.Tags()["images"]) == ["sample_0", "sample_1", "sample_2", "samples"]
        reports.append(json.loads((tmp_path / folder / f"{TOKEN}_report.json").read_text()))
        noted = [json.loads(line) for line in (tmp_path / folder / f"{TOKEN}_metrics.jsonl").read_text().splitlines()]
        (samples,) = [line["samples"] for line in noted if "samples" in line]
        assert sorted(samples) == ["0", "1", "2"]
        assert said.count("to go on") + said.count(f"{TOKEN}.html") == 1
    counts = {path.name: path.read_text().split() for path in tmp_path.glob("drawn*")}
    assert counts["drawn_1_of_2"].count("2") == counts["drawn_0_of_2"].count("2") == 2
    one, two = (report["before"] for report in reports)
    assert (two["loss"], two["distance"]) == pytest.approx((one["loss"], one["distance"]), rel=0.02)


def test_two_processes_with_accumulation_and_every_ddp_option(dataset, tmp_path, tiny_sd2, trainers):  # noqa: F811
    more = ["--max_train_steps=2", "--optimizer_type=SGD", "--learning_rate=0.01"]
    assert (
        run("sd2", arguments("sd2", tiny_sd2, dataset, tmp_path / "one", *more, "--gradient_accumulation_steps=4")) == 0
    )
    argv = arguments("sd2", tiny_sd2, dataset, tmp_path / "two", *more, "--gradient_accumulation_steps=2")
    argv += ["--ddp_static_graph", "--ddp_gradient_as_bucket_view", "--ddp_timeout=5"]
    one_run(SCRIPTS["sd2"].__file__, argv, tmp_path)
    one, two = (load_file(tmp_path / name / f"{TOKEN}.safetensors")["emb_params"] for name in ("one", "two"))
    assert_moved_alike([one], [two], trainers[0].setup.starts)


def test_two_processes_go_on_from_a_state(dataset, tmp_path, tiny_sd1):
    more = ["--max_train_steps=5", "--save_every_n_steps=2", "--save_state", "--num_vectors_per_token=2"]

    def launch(folder: str, *given: str) -> torch.Tensor:
        argv = arguments("sd1", tiny_sd1, dataset, tmp_path / folder, *more, *given)
        one_run(SCRIPTS["sd1"].__file__, argv, tmp_path)
        return load_file(tmp_path / folder / f"{TOKEN}.safetensors")["emb_params"]

    whole = launch("whole")
    state = tmp_path / "whole" / f"{TOKEN}-step00000002-state"
    assert len(TrainingState.read(state).random_states) == 2
    assert torch.equal(launch("rest", f"--resume={state}"), whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_run_that_is_told_to_end_keeps_what_it_learned(dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", "--max_train_steps=100000", "--save_every_n_steps=3")
    argv.append("--max_data_loader_n_workers=1")
    script = Path(SCRIPTS["sd1"].__file__)
    begun = WarmProcess(tmp_path, 0, script, argv, {**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(1200):
        if (tmp_path / "out" / f"{TOKEN}-step00000003.safetensors").exists() or not begun.process.is_alive():
            break
        time.sleep(0.1)
    begun.process.terminate()
    code, _, said = begun.ended(60)
    assert code == 143, said
    kept = re.search(r"The vectors of step (\d+) are kept in (.+)\.$", said, re.MULTILINE)
    assert int(kept[1]) >= 3
    assert load_file(kept[2])["emb_params"].isfinite().all()
    assert "Traceback" not in said


def test_a_mistake_through_the_launcher_is_a_sentence(dataset, tmp_path, tiny_sd1):
    argv = [*arguments("sd1", tiny_sd1, dataset, tmp_path / "out"), "--token_string=cat"]
    command = ["--cpu", "--num_processes=1", SCRIPTS["sd1"].__file__, *argv]
    code, _, said = WarmProcess(tmp_path, 0, Path(launch.__file__), command, launchers_environment()).ended(300)
    assert code != 0
    assert 'error: --token_string "cat"' in said


def test_a_launcher_of_two_processes_ends_with_them(dataset, tmp_path, tiny_sd1):
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out")
    settings = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]

    def begin(port: int) -> list[Ended]:
        command = [*settings, f"--main_process_port={port}", SCRIPTS["sd1"].__file__, *argv]
        return [WarmProcess(tmp_path, 0, Path(launch.__file__), command, launchers_environment()).ended(300)]

    ((code, said, errors),) = on_a_free_port(begin)
    assert code == 0, errors
    assert said.count("The embedding is in") == 1
    assert load_file(tmp_path / "out" / f"{TOKEN}.safetensors")["emb_params"].isfinite().all()


def test_loader_workers_change_nothing(dataset, tmp_path, tiny_sd1):
    for workers in (0, 2):
        argv = arguments("sd1", tiny_sd1, dataset, tmp_path / str(workers), "--max_train_steps=6")
        argv = [a for a in argv if a != "--cache_latents"] + [f"--max_data_loader_n_workers={workers}"]
        assert run("sd1", [*argv, "--persistent_data_loader_workers"] if workers else argv) == 0
    first, second = (load_file(tmp_path / name / f"{TOKEN}.safetensors")["emb_params"] for name in ("0", "2"))
    assert torch.equal(first, second)


def test_two_processes_agree_on_a_seed(dataset, tmp_path, tiny_sd1):
    argv = [a for a in arguments("sd1", tiny_sd1, dataset, tmp_path) if not a.startswith("--seed")]
    # Without a word to start from, the start itself depends on the seed.
    argv = [a for a in argv if not a.startswith("--init_word")]
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train_textual_inversion; from library.output.saving import Saving; original = Saving.finish\n"
        "def finish(self, progress):\n"
        f"    torch.save([*self.learner.rows.parameters()], {str(tmp_path)!r} + '/rows' + os.environ['RANK'])\n"
        "    return original(self, progress)\n"
        "Saving.finish = finish; sys.exit(train_textual_inversion.main())\n"
    )
    one_run(script, argv, tmp_path)
    first, second = (torch.load(tmp_path / f"rows{rank}")[0] for rank in (0, 1))
    assert torch.equal(first, second)


# Run before the script itself: what accelerate does for GPUs, where DDP moves the module's inputs to its device.
AS_ON_GPUS = """
from torch.nn.parallel import DistributedDataParallel as DDP
original = DDP.__init__
def init(self, *arguments, **options):
    original(self, *arguments, **options)
    self.device_ids, self.device_type = [0], "cpu"
DDP.__init__ = init
"""
# How many images each call draws, by process.
COUNTING = """
def draw(self, wanted, **details):
    with open({folder!r} + "/drawn_" + os.environ["RANK"] + "_of_" + os.environ["WORLD_SIZE"], "a") as file:
        print(len(wanted), file=file)
    return original(self, wanted, **details)
SamplingPipeline.draw = draw
"""
# One of the processes is killed as soon as it has made its third step.
LOSING = """
from library.training.optimizer_step import Learner
original = Learner.step
def step(self, batches, task):
    result = original(self, batches, task)
    if self.progress.step == 3 and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), 9)
    return result
Learner.step = step
"""


def metadata(file) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def script(folder: Path, before: str) -> Path:
    """The script of SD models after ``before``, as a file."""
    file = folder / "script.py"
    file.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\n"
        "import train_textual_inversion\nsys.exit(train_textual_inversion.main())\n"
    )
    return file


def test_two_processes_are_one_run_with_one_log_as_on_gpus(dataset, tmp_path, tiny_sd1):
    """Nothing tells accelerate to use the CPU, and DDP has devices, as where there are two GPUs."""
    log = tmp_path / "log.txt"
    argv = arguments("sd1", tiny_sd1, dataset, tmp_path / "out", f"--console_log_file={log}")
    (first, out, errors), (second, silence, more_errors) = two_processes(script(tmp_path, AS_ON_GPUS), argv, tmp_path)
    assert (first, second) == (0, 0), errors + more_errors
    assert out.count("The embedding is in") == 1
    assert silence == ""
    assert "2 processes" in log.read_text()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
@pytest.mark.parametrize("lost", [0, 1])
def test_the_process_that_is_left_keeps_the_vectors(lost, dataset, tmp_path, tiny_sd1_file):
    more = ["--max_train_steps=50", "--save_every_n_steps=2"]
    argv = arguments("sd1", tiny_sd1_file, dataset, tmp_path / "out", *more)
    done = two_processes(script(tmp_path, LOSING.format(rank=lost)), argv, tmp_path)
    assert done[lost][0] == -signal.SIGKILL, done
    code, _, said = done[1 - lost]
    assert code == 1, said
    assert "Traceback" not in said
    assert "error: Another process of this run is gone" in said
    kept = re.search(r"The vectors of step 3 are kept in (.+)\.$", said, re.MULTILINE)
    assert load_file(kept[1])["emb_params"].isfinite().all()
    # It is a file of the same run as the main process's, which alone reads the checkpoint for its hash.
    of_main, of_rescue = metadata(tmp_path / "out" / f"{TOKEN}-step00000002.safetensors"), metadata(kept[1])
    assert of_rescue["ti.run"] == of_main["ti.run"]
    assert "ti.base_model_hash" in of_main
    assert ("ti.base_model_hash" in of_rescue) == (lost == 1)


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("lambda: 0", 0, ""),
        ("lambda: 1", 1, ""),
        ("lambda: sys.exit()", 0, ""),
        ("lambda: sys.exit(2)", 2, ""),
        ("lambda: 1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_process_among_several_ends_whatever_holds_it(work, code, said):
    """Here a thread that never ends."""
    program = (
        "import sys, threading; from library.support.processes import ended_at_once\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        f"print('written', end=''); ended_at_once({work})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (code, "written")
    assert said in done.stderr


# Process 0 has begun a sum that process 1 never takes part in.
STUCK = """
import sys, time, torch, torch.distributed as dist
from library.support.processes import ended_at_once
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
dist.barrier()
if sys.argv[2] == "1":
    time.sleep(3600)
def work():
    global under_way
    under_way = dist.all_reduce(torch.ones(1), async_op=True)
    return 7
ended_at_once(work)
"""


def test_a_process_ends_though_its_partner_is_stuck(tmp_path):
    """An interpreter's ordinary end waits for the thread that sums."""
    command = [sys.executable, "-c", STUCK, (tmp_path / "meeting").as_uri()]
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    begun = [subprocess.Popen([*command, rank], cwd=ROOT, env=environment) for rank in ("0", "1")]
    try:
        assert begun[0].wait(120) == 7
        assert begun[1].poll() is None
    finally:
        for each in begun:
            each.kill()
            each.wait()


def test_processes_that_accelerate_does_not_join_are_refused(dataset, tmp_path, tiny_sd1, monkeypatch, capsys):
    # As with two processes on one Mac: its device cannot be shared, and each would train on its own.
    monkeypatch.setattr("library.support.processes.count", lambda: 2)
    monkeypatch.setattr("library.command_line.ended_at_once", lambda work: work())
    assert run("sd1", arguments("sd1", tiny_sd1, dataset, tmp_path / "out")) == 1
    assert "2 processes (WORLD_SIZE or its like), but accelerate joined 1 on cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_taken_in_between_is_left_for_another(monkeypatch, tmp_path):
    """Here another program listens to the port that was found free first."""
    file = tmp_path / "joins.py"
    file.write_text(
        "import os, torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "dist.barrier()\n"  # the first holds the store that the second joins by: it may not be gone before
        "print(dist.get_world_size(), os.environ['MASTER_PORT'])\n"
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken, fine = other.getsockname()[1], free_port()
        ports = iter([taken, fine])
        monkeypatch.setattr(sys.modules[__name__], "free_port", lambda: next(ports))
        done = two_processes(file, [], tmp_path)
    assert [(code, out) for code, out, _ in done] == [(0, f"2 {fine}\n")] * 2, done


@pytest.mark.parametrize(
    ("contents", "cores"),
    [
        (["200000 100000"], 2),
        (["150000 100000"], 2),
        (["10000 100000"], 1),
        (["max 100000"], 8),
        (["900000 100000"], 8),
        ([None, "300000", "100000"], 3),
        ([None, "-1", "100000"], 8),
        ([None, None, None], 8),
        (["nonsense"], 8),
    ],
)
def test_cores_are_those_of_the_container(contents, cores, tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("max", "quota", "period")]
    for file, content in zip(files, contents, strict=False):
        if content is not None:
            file.write_text(f"{content}\n")
    monkeypatch.setattr(processes, "_CONTAINER_LIMITS", ((files[0],), files[1:]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processes.usable_cores() == cores
