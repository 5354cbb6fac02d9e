"""What pytest leaves aside on this machine, how hypothesis draws, and what tests share."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

# It imports Triton's kernels; test_attention_triton.py runs it where Triton is there.
collect_ignore = [] if find_spec("triton") else ["interpreted_attention.py"]

# Machines are shared: what takes long under load is not wrong.
PATIENT = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
# A change is judged by the same examples each time; `make fuzz` draws new ones.
settings.register_profile("repeatable", PATIENT, derandomize=True)
settings.register_profile("new", PATIENT)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """transformers without a word, PyTorch on one thread."""
    import torch
    import transformers

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)
