"""Tokenizers small enough to build in a test, of the two kinds that language models have."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from quire.engine.tokenizer import Tokenizer, load_tokenizer

TEXT = "hello world, hello there. あのね、こんにちは 你好 你们好 🙂🙂👍🏽 naïve café 🙂"
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if messages[0]['role'] == 'nobody' %}{{ raise_exception('unknown role nobody') }}{% endif %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_level_backend() -> Backend:
    """Like GPT-2, Llama 3 and Qwen: merges of bytes, some of which end or begin inside a character."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])  # added, but not special
    return backend


def byte_fallback_backend() -> Backend:
    """Like Llama 2: words begin with ▁, what is not in the vocabulary is spelled in byte tokens `<0x00>`..`<0xFF>`."""
    pieces = [*"▁helowrdatnifc,.", "▁h", "▁w", "he", "ll", "▁he", "or", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "h"), ("▁", "w"), ("h", "e"), ("l", "l"), ("▁h", "e"), ("o", "r"), ("▁", "▁")]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def save(backend: Backend, folder: Path, chat_template: str | None = None) -> Path:
    """Write `backend` to `folder` as transformers does."""
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    if chat_template is not None:
        hf_tokenizer.chat_template = chat_template
    hf_tokenizer.save_pretrained(str(folder))
    return folder


def saved_and_loaded(backend: Backend, folder: Path, chat_template: str | None = None) -> Tokenizer:
    return load_tokenizer(save(backend, folder, chat_template))


def wrapped(backend: Backend) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


@cache
def byte_level() -> Tokenizer:
    return wrapped(byte_level_backend())


@cache
def byte_fallback() -> Tokenizer:
    return wrapped(byte_fallback_backend())
