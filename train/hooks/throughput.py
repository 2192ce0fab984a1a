"""Tokens per second and MFU, of the time that was training.

MFU here = useful FLOPs / (seconds * peak FLOPs of the chips), where useful = forward + backward of the active
parameters, plus attention over the pairs that the causal mask lets through (MixtralConfig.flops_per_token, "causal");
recomputation does not count, padding does. Peaks are dense bf16. On a CPU, which has no agreed peak, mfu is null.
"""

import time

import jax

# Dense bf16 FLOP/s of one jax device, by a part of its device_kind in lower case. First match counts.
PEAK_FLOPS: dict[str, float] = {
    "tpu v5p": 459e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "a100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device; None where no figure is known (CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind.lower()), None)


class Throughput:
    """Seconds, tokens and FLOPs between two readings."""

    def __init__(self, flops_per_token: float):
        self._flops_per_token = flops_per_token
        self._devices = jax.device_count()
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self.restart()

    def add(self, tokens: int) -> None:
        """One step is done."""
        self._steps += 1
        self._tokens += tokens

    def exclude(self, seconds: float) -> None:
        """Time that was not training: evaluation, sampling."""
        self._start += seconds

    def read(self, data_wait: float) -> dict[str, float | None]:
        """perf/* since the last reading; `data_wait` counts from the start. The last step's result must be there."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._tokens / seconds
        flops = rate * self._flops_per_token / self._devices
        result = {
            "perf/step_seconds": seconds / max(self._steps, 1),
            "perf/tokens_per_second": rate,
            "perf/tokens_per_second_per_device": rate / self._devices,
            "perf/tflops_per_device": flops / 1e12,
            "perf/mfu": flops / self._peak if self._peak else None,
            "perf/data_wait_seconds": (data_wait - self._wait) / max(self._steps, 1),
        }
        self.restart(data_wait)
        return result

    def restart(self, data_wait: float = 0.0) -> None:
        """Count from now; `data_wait` seconds were waited for data before."""
        self._wait = data_wait
        self._start, self._steps, self._tokens = time.perf_counter(), 0, 0
