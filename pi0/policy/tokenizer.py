"""Prompts to token ids.

Both tokenizers follow openpi (src/openpi/models/tokenizer.py: PaligemmaTokenizer). A prompt of pi0 is
beginning-of-sequence, the cleaned text, then a newline as "start of answer". A prompt of pi0.5 is
beginning-of-sequence and a text that also spells the state (`state_prompt`). Both are padded with id 0 to a fixed
length. Cleaning strips the ends and turns underscores and newlines into spaces. openpi cuts a prompt that is too
long; here it is an error. LeRobot (src/lerobot/policies/pi0/processor_pi0.py) does not clean pi0's prompts, and
encodes text and newline together.

`python -m pi0.tokenizer` rebuilds the vocabulary of `TinyTokenizer` from the installed LIBERO tasks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np

from pi0.base.errors import CheckpointError, MissingFileError
from pi0.base.files import why_unreadable, write_whole

VOCABULARY_FILE = Path(__file__).with_name("tiny_vocabulary.json")
PIECES = 125  # words and phrases of the tiny vocabulary: 384 ids with the 3 special ones and 256 bytes
LONGEST_PHRASE = 6  # words
STATE_BINS = 256
_GET_IT = (
    "Download gs://big_vision/paligemma_tokenizer.model (the tokenizer.model of google/paligemma-3b-pt-224 is the "
    "same file)"
)


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as openpi's pi0 does before tokenisation."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: np.ndarray) -> np.ndarray:
    """Bins of a normalised state, int [...]: [-1, 1) in 256 equal parts, 0 to 255; -1 is below, 255 also above."""
    return np.digitize(state, np.linspace(-1, 1, STATE_BINS + 1)[:-1]) - 1


def state_prompt(prompt: str, state: np.ndarray) -> str:
    """pi0.5's text: the cleaned prompt and the bins of a normalised state [D].

    LeRobot (src/lerobot/policies/pi05/processor_pi05.py) writes the same; until March 2026 it padded the state
    first.
    """
    bins = " ".join(str(number) for number in state_bins(state))
    return f"Task: {clean_prompt(prompt)}, State: {bins};\nAction: "


class Tokenizer:
    """Common part of the tokenizers: fixed length, mask, and a cache of prompts.

    Args:
        length: tokens of every encoded prompt.
    """

    def __init__(self, length: int):
        self.length = length
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def token_ids(self, text: str, newline: bool = True) -> list[int]:
        """Ids of beginning-of-sequence, a text and, if `newline`, a newline; not padded."""
        raise NotImplementedError

    def encode(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [length] and mask bool [length], False for padding.

        Args:
            prompt: the instruction.
            state: normalised state, float [D], to spell in the prompt of pi0.5; None for pi0.

        Raises:
            CheckpointError: the prompt has more than `length` tokens.
        """
        if state is not None:
            return self._pad(self.token_ids(state_prompt(prompt, state), newline=False), prompt)
        if prompt not in self._known:
            self._known[prompt] = self._pad(self.token_ids(clean_prompt(prompt)), prompt)
        return self._known[prompt]

    def _pad(self, ids: list[int], prompt: str) -> tuple[np.ndarray, np.ndarray]:
        if len(ids) > self.length:
            raise CheckpointError(
                f"prompt {prompt!r} takes {len(ids)} tokens; the model is built for {self.length} (prompt_length in "
                "its config.json): choose a task with a shorter prompt, or another policy"
            )
        padded = np.zeros(self.length, np.int64)
        padded[: len(ids)] = ids
        return padded, np.arange(self.length) < len(ids)

    def encode_batch(
        self, prompts: list[str], states: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [B, length] and mask bool [B, length] of B prompts; states [B, D] as in `encode`."""
        spelt = [None] * len(prompts) if states is None else states
        ids, masks = zip(*(self.encode(p, s) for p, s in zip(prompts, spelt, strict=True)), strict=True)
        return np.stack(ids), np.stack(masks)


class TinyTokenizer(Tokenizer):
    """Words and frequent phrases of LIBERO's prompts, in lower case; other words are spelled in bytes.

    Ids: 0 padding, 1 beginning, 2 newline, 3 to 258 bytes, then the pieces. A phrase has one id, which makes
    prompts half as long: the prefix is most of what a CPU computes.
    """

    PAD, BOS, NEWLINE, FIRST_BYTE, FIRST_PIECE = 0, 1, 2, 3, 259

    def __init__(self, length: int, pieces: list[str] | None = None):
        super().__init__(length)
        self.pieces = json.loads(VOCABULARY_FILE.read_text())["pieces"] if pieces is None else pieces
        self._ids = {piece: self.FIRST_PIECE + i for i, piece in enumerate(self.pieces)}

    @property
    def vocab_size(self) -> int:
        return self.FIRST_PIECE + len(self.pieces)

    def token_ids(self, text: str, newline: bool = True) -> list[int]:
        ids = [self.BOS]
        for piece in split_pieces(text.lower().split(" "), self._ids):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids.extend(self.FIRST_BYTE + byte for byte in f" {piece}".encode())
        return [*ids, self.NEWLINE] if newline else ids

    def decode(self, ids: list[int]) -> str:
        """Cleaned, lower-case prompt of a sequence of ids."""
        text = b""
        for i in ids:
            if i >= self.FIRST_PIECE:
                text += b" " + self.pieces[i - self.FIRST_PIECE].encode()
            elif i >= self.FIRST_BYTE:
                text += bytes([i - self.FIRST_BYTE])
        return text.decode(errors="replace")[1:]


class PaligemmaTokenizer(Tokenizer):
    """PaliGemma's sentencepiece model, which the published pi0 uses.

    Args:
        path: `paligemma_tokenizer.model`; None takes it from the environment variable PALIGEMMA_TOKENIZER.
        length: tokens of every encoded prompt.

    Raises:
        FileNotFoundError: no such file; the message tells where to download it.
        CheckpointError: it is a file of another kind.
    """

    def __init__(self, path: str | os.PathLike | None, length: int):
        super().__init__(length)
        path = path or os.environ.get("PALIGEMMA_TOKENIZER")
        if not path or not Path(path).is_file():
            raise MissingFileError(
                f"PaliGemma tokenizer file {path or '(not configured)'} not found. {_GET_IT}, then set tokenizer_path "
                "in config.json or the environment variable PALIGEMMA_TOKENIZER."
            )
        import sentencepiece  # only this tokenizer needs it

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"PaliGemma tokenizer file {path}: not a sentencepiece model: {why_unreadable(Path(path), error)}. "
                f"It is called tokenizer.model, not tokenizer.json. {_GET_IT}"
            ) from error
        self.path = path
        self.vocab_size = self._model.vocab_size()

    def token_ids(self, text: str, newline: bool = True) -> list[int]:
        ids = self._model.encode(text, add_bos=True)
        return ids + self._model.encode("\n") if newline else ids


def split_pieces(words: list[str], pieces: dict[str, int] | set[str]) -> list[str]:
    """Cut words into the longest known pieces from the left; an unknown word stays alone."""
    result, start = [], 0
    while start < len(words):
        for end in range(min(start + LONGEST_PHRASE, len(words)), start, -1):
            piece = " ".join(words[start:end])
            if piece in pieces or end == start + 1:
                result.append(piece)
                start = end
                break
    return result


def build_vocabulary(prompts: list[str], size: int = PIECES) -> list[str]:
    """All words of the prompts in order, then phrases: the most frequent pairs are merged, one at a time."""
    sentences = [clean_prompt(prompt).lower().split() for prompt in prompts]
    pieces = sorted({word for words in sentences for word in words})
    while len(pieces) < size:
        pairs: Counter[str] = Counter()
        for words in sentences:
            cut = split_pieces(words, set(pieces))
            pairs.update(f"{a} {b}" for a, b in pairwise(cut))
        candidates = [
            (-n, p) for p, n in pairs.items() if len(p.split()) <= LONGEST_PHRASE and p not in pieces
        ]
        if not candidates:
            break
        pieces.append(min(candidates)[1])
    return pieces


def libero_prompts() -> list[str]:
    """Prompts of all 130 LIBERO tasks, derived from file names as in LIBERO's benchmark, without importing LIBERO."""
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the LIBERO package (hf-libero) is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)), "libero", "bddl_files")
    names = sorted(path.stem for path in folder.glob("libero_*/*.bddl"))
    return [re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ") for name in names]


def main(arguments: list[str] | None = None) -> None:
    """Run the command `python -m pi0.tokenizer`."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.tokenizer",
        description="Rebuild the vocabulary of the tiny policies from the prompts of the installed LIBERO's tasks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=VOCABULARY_FILE, help="file to write")
    options = parser.parse_args(arguments)
    vocabulary = build_vocabulary(libero_prompts())
    write_whole(options.output, json.dumps({"pieces": vocabulary}, indent=0) + "\n")
    print(f"{options.output}: {len(vocabulary)} pieces")
