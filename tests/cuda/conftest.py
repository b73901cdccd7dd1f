"""What runs kernels of csrc/cuda in place of a GPU: see running.py."""

import shutil

import pytest

from tests.cuda.running import KINDS, as_program, compile_host, in_process, standing_in


@pytest.fixture(scope="session")
def compiler():
    if shutil.which("g++") is None:
        pytest.skip("no g++ to run CUDA kernels on the CPU with")


@pytest.fixture(scope="session")
def host_library(compiler, tmp_path_factory):
    return compile_host(tmp_path_factory.mktemp("host"), None)


@pytest.fixture
def host(host_library):
    """Kernels run on tensors of this process."""
    with standing_in(in_process(host_library)):
        yield


@pytest.fixture(scope="session")
def programs(compiler, tmp_path_factory):
    """The program with the sanitizers of a kind, compiled when it is first asked for."""
    made = {}

    def program(kind):
        if kind not in made:
            made[kind] = compile_host(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return program


@pytest.fixture(params=sorted(KINDS))
def sanitized(request, programs, tmp_path):
    """Each launch runs under sanitizers."""
    with standing_in(as_program(programs(request.param), tmp_path)):
        yield request.param
