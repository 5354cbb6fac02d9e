"""What pytest leaves aside on this machine, and how hypothesis draws."""

from importlib.util import find_spec

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
