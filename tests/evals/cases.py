"""Tasks of every kind that the harness has, over a few sentences, and a model with its files for transformers."""

from pathlib import Path

from mixtral_jax.convert import save_hf
from mixtral_jax.data.text import load_tokenizer, tokenizer_files
from tests.tiny import WORDS, tiny_config, tiny_model, write_byte_tokenizer

DOCS = f"""
import random

def rows(**_):
    import datasets
    rng = random.Random(0)
    def sentence(n):
        return " ".join(rng.choices({WORDS!r}, k=n))
    def row():
        choices = [sentence(1) + f" {{i}}" for i in range(3)]
        return {{"question": sentence(3), "choices": choices, "answer": rng.randrange(3), "text": sentence(8),
                 "letter": rng.choice("AB")}}
    return {{"test": datasets.Dataset.from_list([row() for _ in range(6)])}}
"""
COMMON = "custom_dataset: !function docs.rows\ntest_split: test\nfewshot_split: test\n"
CHOICES = "output_type: multiple_choice\ndoc_to_text: '{{question}}? '\ndoc_to_choice: choices\ndoc_to_target: answer\n"
ACC = "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
TASKS = {
    "choice": f"{CHOICES}{ACC}num_fewshot: 0\n",
    "shots": f"{CHOICES}{ACC}num_fewshot: 1\ndescription: 'Three answers, one is right.\n\n  '\n",
    "letters": "output_type: multiple_choice\ndoc_to_text: '{{question}}\nAnswer:'\ndoc_to_choice: [A, B]\n"
    "doc_to_target: letter\nmetric_list: [{metric: acc}]\nnum_fewshot: 0\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "written": "output_type: generate_until\ndoc_to_text: '{{question}}:'\ndoc_to_target: letter\n"
    "generation_kwargs: {until: [' e', 'Q'], max_gen_toks: 12, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]\nnum_fewshot: 0\n",
}


def write_tasks(directory: Path) -> Path:
    directory.mkdir()
    (directory / "docs.py").write_text(DOCS)
    for name, text in TASKS.items():
        (directory / f"tiny_{name}.yaml").write_text(f"task: tiny_{name}\n{COMMON}{text}")
    return directory


def write_model(directory: Path, **changes):
    """A model and its tokenizer, which are also in `directory` as transformers reads them."""
    write_byte_tokenizer(directory.parent / "tokenizer.json")
    tokenizer = load_tokenizer(directory.parent / "tokenizer.json")
    model = tiny_model(tiny_config(vocab_size=258, max_position_embeddings=128, **changes))
    save_hf(model, directory)
    for name, content in tokenizer_files(tokenizer, "v1").items():
        (directory / name).write_bytes(content)
    return model, load_tokenizer(directory)
