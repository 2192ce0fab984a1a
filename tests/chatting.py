"""A chat with a small random model that never ends an answer, on the terminal that this process is given.

python -m tests.chatting DIRECTORY
"""

import fcntl
import sys
import termios
from pathlib import Path

from mixtral_jax.data.text import load_tokenizer
from mixtral_jax.train.commands.chat import Conversation, converse
from mixtral_jax.train.text import Codec
from tests.tiny import tiny_config, tiny_model, write_byte_tokenizer

if __name__ == "__main__":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C there is a signal here
    file = Path(sys.argv[1], "tokenizer.json")
    write_byte_tokenizer(file)
    model = tiny_model(tiny_config(max_position_embeddings=4096))
    codec = Codec(model, load_tokenizer(file), "v1", [[{"role": "user", "content": ""}]])
    codec.ends = []
    converse(Conversation(model, codec, [], {"max_new_tokens": 3000, "temperature": 1.0}))
