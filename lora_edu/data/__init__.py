"""What the course works on: text that every reader has (`corpus`) and the shipped checkpoints (`shipped`)."""

from lora_edu.data.corpus import Corpus, load_corpus
from lora_edu.data.shipped import load_checkpoint

__all__ = ["Corpus", "load_checkpoint", "load_corpus"]
