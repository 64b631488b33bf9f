import pytest

from maskmoe_kernels.backends import native


@pytest.fixture(autouse=True)
def _the_isa_stays():
    """Runners choose an instruction set for the whole process: the next test starts afresh."""
    before = native.isa()
    yield
    if before is not None:
        native.set_isa(before)


@pytest.fixture
def usual_machine():
    """The host twin runs on the machine that it stands for; the next test starts afresh."""
    from tests.ops.cuda_twin import configure  # which compiles the twin

    configure()
    yield
    configure()
