"""The dtypes that weights are kept in, and every name under which they go."""

import ml_dtypes
import numpy as np

BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
WEIGHTS = {dtype.name: dtype for dtype in (BFLOAT16, FLOAT16, FLOAT32)}  # as numpy, jax and config.json say
SHORT = {"bf16": BFLOAT16, "fp16": FLOAT16, "fp32": FLOAT32}
SAFETENSORS = {"BF16": BFLOAT16, "F16": FLOAT16, "F32": FLOAT32}
