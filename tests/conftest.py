"""What every test gets: no network, and settings, threads and default dtype as it found them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before torch loads OpenMP: on a machine with more work than cores, spinning threads would make
# thousands of tiny parallel regions take minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before anything imports the standard library's distutils: setuptools refuses to load on top of
# that, and torch's inductor loads setuptools.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vitfast.engine.products import onednn
from vitfast.engine.products import weights as weights_cache
from vitfast.runtime import native
from vitfast.settings import settings


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "check: a generic test on a sample tagged 'check'; repeated on every ISA level"
    )
    config.addinivalue_line("markers", "in_a_process: runs other tests in a process of its own")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run others in a process, minutes each, come first: half of them at the beginning,
    half in the middle, near which the second of two workers begins."""
    long = [i for i in items if i.get_closest_marker("in_a_process")]
    rest = [i for i in items if not i.get_closest_marker("in_a_process")]
    half, middle = len(long) // 2, len(rest) // 2 + 4
    items[:] = long[:half] + rest[:middle] + long[half:] + rest[middle:]


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """vitfast opens no connection: in the whole suite an attempt raises."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a connection to {address!r} was attempted")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def same_state_after() -> Iterator[None]:
    saved = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(settings).items()}
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    vars(settings).update(saved)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def needs_native() -> None:
    if native.reasons():
        pytest.skip("; ".join(native.reasons()))


@pytest.fixture
def fork_while_held() -> Callable[[Any, Callable[[], object]], None]:
    """fork_while_held(lock, work): a child forked while a thread holds the lock can do the work."""

    def check(lock: Any, work: Callable[[], object]) -> None:
        held, forked = threading.Event(), threading.Event()

        def hold() -> None:
            with lock:
                held.set()
                forked.wait()

        threading.Thread(target=hold).start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            work()
            os._exit(0)
        forked.set()
        assert os.waitpid(child, 0)[1] == 0

    return check


def _rank(rank: int, world: int, store: str, results: Any, work: Any, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever this machine's name resolves to
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results.put((rank, work(rank, *arguments)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def in_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, Any]]:
    """in_ranks(work, *arguments): rank -> what work(rank, *arguments) returned in two processes.

    `work` is a function of a test module; the processes are a group on gloo.
    """
    # The processes import the test's module by its name; vitfast from where it is installed.
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])

    def run(work: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
        results, world = mp.get_context("spawn").SimpleQueue(), 2
        mp.spawn(_rank, (world, str(tmp_path / "store"), results, work, arguments), nprocs=world)
        return dict(results.get() for _ in range(world))

    return run


@pytest.fixture
def needs_onednn() -> None:
    if onednn._missing():
        pytest.skip("; ".join(onednn._missing()))


@pytest.fixture
def empty_cache() -> Iterator[None]:
    """No weight is kept from another test, nor for one."""
    weights_cache.clear_weight_cache()
    yield
    weights_cache.clear_weight_cache()


class Recipe(NamedTuple):
    """A small model of timm's, and how long it is trained on digits.

    Attributes:
        name: timm's, of an architecture.
        kwargs: what makes it small, for `timm.create_model`.
        epochs: passes over 1,437 images, in batches of 64.
        rate: the highest learning rate of the schedule.
    """

    name: str
    kwargs: dict[str, Any]
    epochs: int
    rate: float


RECIPES = {
    "vit": Recipe(
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4},
        epochs=12,
        rate=2e-3,
    ),
    "swin": Recipe(
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 32, "depths": (2, 1, 1),
         "num_heads": (2, 4, 8), "drop_path_rate": 0.0},
        epochs=10,
        rate=3e-3,
    ),
    "convnext": Recipe(
        "convnext_tiny",
        {"depths": (1, 1, 1, 1), "dims": (32, 64, 64, 64),
         "pretrained_cfg_overlay": {"input_size": (3, 32, 32), "test_input_size": None}},
        epochs=8,
        rate=4e-3,
    ),
}  # fmt: skip
"""Each takes 10 to 20 s on one core; all three are right about 96 % of held-out images or more."""


class Digits(NamedTuple):
    """Scikit-learn's handwritten digits, and a small model that was trained on most of them.

    Attributes:
        model: timm's name of its architecture.
        model_kwargs: what makes it small, for `timm.create_model`.
        checkpoint: its weights, those of a classifier of ten classes included.
        images: uint8 [360, 32, 32], which it was not trained on.
        labels: int64 [360].
    """

    model: str
    model_kwargs: dict[str, Any]
    checkpoint: Path
    images: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="session")
def trained_on_digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Digits]:
    """trained_on_digits("swin"), of `RECIPES`: trained once, by whichever worker asks first."""
    from filelock import FileLock

    datasets = pytest.importorskip("sklearn.datasets")
    values, labels = datasets.load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = pixels.repeat(4, 1).repeat(4, 2)
    order = np.random.default_rng(0).permutation(len(images))
    held_out, rest = order[:360], order[360:]
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers

    def trained(kind: str) -> Digits:
        recipe = RECIPES[kind]
        path = folder / f"digits-{kind}.pth"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                torch.save(_trained_on(images[rest], labels[rest], recipe), f"{path}.part")
                os.replace(f"{path}.part", path)
        return Digits(recipe.name, recipe.kwargs, path, images[held_out], labels[held_out])

    return trained


@pytest.fixture(scope="session")
def digits(trained_on_digits: Callable[[str], Digits]) -> Digits:
    """The digits, and a ViT that was trained on them."""
    return trained_on_digits("vit")


def _trained_on(images: np.ndarray, labels: np.ndarray, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The state dict of a timm model after its epochs, on one thread; seeded."""
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config
    from torch.nn.functional import cross_entropy

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model = timm.create_model(recipe.name, num_classes=10, **recipe.kwargs).train()
        config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
        transform = create_transform(**config)
        x = torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in images])
        y = torch.from_numpy(labels)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        steps = recipe.epochs * -(-len(x) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
        for _ in range(recipe.epochs):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                cross_entropy(model(x[batch]), y[batch], label_smoothing=0.1).backward()
                optimizer.step()
                schedule.step()
        return model.state_dict()
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
