"""Tokens per second and MFU, of the time that was training.

MFU = useful FLOPs of the steps / (seconds * peak FLOPs of the chips). Both are the plan's: useful_flops says what
counts, peak_flops knows the chips. On a CPU, which has no agreed peak, mfu is null.
"""

import time

import jax


class Throughput:
    """Seconds, tokens and FLOPs between two readings."""

    def __init__(self, flops_per_step: float, peak: float | None):
        """`flops_per_step` of all devices together; `peak` FLOP/s of one."""
        self._flops_per_step, self._peak = flops_per_step, peak
        self._devices = jax.device_count()
        self.restart()

    def add(self, tokens: int) -> None:
        """One step is done, with so many tokens that are not padding."""
        self._steps += 1
        self._tokens += tokens

    def exclude(self, seconds: float) -> None:
        """Time that was not training: evaluation, sampling."""
        self._start += seconds

    def read(self, data_wait: float) -> dict[str, float | None]:
        """perf/* since the last reading; `data_wait` counts from the start. The last step's result must be there."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._tokens / seconds
        flops = self._steps * self._flops_per_step / seconds / self._devices
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
