"""What pytest leaves aside on this machine, and how hypothesis draws."""

from importlib.util import find_spec

from hypothesis import HealthCheck, settings

# It imports Triton's kernels; test_attention_triton.py runs it where Triton is there.
collect_ignore = [] if find_spec("triton") else ["interpreted_attention.py"]

# Machines are shared: what takes long under load is not wrong.
settings.register_profile(
    "shared",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("shared")
