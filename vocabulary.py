"""
Text, control tokens and speech codes in one id space, which any Qwen2-like BPE and any codebook can have:

    0 .. n_text - 1       byte-level BPE                                  Qwen2: 0 .. 151,642
    n_text ..             the folder's own specials, then CONTROL         Qwen2: 151,643 .. 151,653
    ..                    spare rows, if the folder's model has some      Qwen2: .. 151,935
    code_start ..         n_codes speech codes                            CosyVoice: 151,936 .. 156,031
    .. size - 1           padding to a multiple of 128                    none: 156,032 = 128 * 1,219

    vocab = Vocabulary.load(folder)
    vocab.encode('Hello there.'), vocab.control['<|sot|>'], vocab.code_start + code
"""
import json
import re
import unicodedata
from itertools import count, zip_longest
from pathlib import Path

import tiktoken

from common.files import read_json

CONTROL = {     # name: words that describe it, from which its embedding can start (train.py --new_rows=words)
    '<|asr|>': 'transcribe the speech', '<|tts|>': 'read the text aloud',
    '<|sos|>': 'start of speech', '<|eos|>': 'end of speech',
    '<|sot|>': 'start of text', '<|eot|>': 'end of text',
    '<|silent_text|>': 'silent text', '<|silent_speech|>': 'silent speech',
}

# how Qwen2 cuts text into pieces before BPE: tokenizer.json says it, vocab.json and merges.txt do not
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# GPT-2 spells each byte of a token as a visible character: its own if it has one, else one from 256 on
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = sorted(set(range(256)) - set(VISIBLE))
BYTE_OF_CHAR = dict(zip(VISIBLE + list(range(256, 324)), VISIBLE + INVISIBLE, strict=True))


class Vocabulary:
    """
    encode, decode          text <-> ids below n_text
    control[name]           id of a control token; untrained: the ids of those whose rows are new
    code_start + code       id of a speech code; n_codes of them
    size                    rows of a model's embedding
    """

    def __init__(self, tokens, merges, pattern, added, settings, n_row, code_start, n_codes, control=()):
        self.tokens, self.merges, self.pattern, self.settings = tokens, merges, pattern, settings
        ranks = {token.translate(BYTE_OF_CHAR).encode('latin-1'): i for i, token in enumerate(tokens)}
        self.bpe = tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.n_text = len(tokens)

        # In a folder that save() wrote every row has a name. Codes stay where they are; what is named
        # reserved is free.
        named = {entry['content']: entry['id'] for entry in added}
        if code_start is None and '<|s_0|>' in named:
            code_start = named['<|s_0|>']
            n_codes = next(n for n in count() if named.get(f'<|s_{n}|>') != code_start + n)
        is_ours = re.compile(r'<\|(s|reserved)_\d+\|>').fullmatch
        self.added = [entry for entry in added if not is_ours(entry['content'])]
        first = max([self.n_text - 1] + [entry['id'] for entry in self.added]) + 1
        codes = range(0) if code_start is None else range(code_start, code_start + n_codes)
        free = (i for i in count(first) if i not in codes)
        names = dict.fromkeys([*CONTROL, *control])     # those of single layouts behind those of all
        self.control = {name: named[name] if name in named else next(free) for name in names}
        self.untrained = [i for name, i in self.control.items() if name not in named]
        self.code_start = max(next(free), n_row) if code_start is None else code_start
        self.n_codes, last = n_codes, max(self.code_start + n_codes - 1, *self.control.values())
        self.size = (last // 128 + 1) * 128     # multiples of 128 are fast on GPUs

    @classmethod
    def load(cls, folder, n_codes=0, control=()):
        """
        Reads tokenizer.json, or vocab.json and merges.txt. Codes start at the vocab_size of the folder's
        config.json, if any: the rows of its model are left alone. A folder that has codes already (a
        checkpoint of ours) says itself where and how many, and n_codes is ignored. control: names of control
        tokens besides CONTROL, those of Layout.control
        """
        folder = Path(folder)
        names = 'config.json', 'tokenizer_config.json', 'tokenizer.json', 'vocab.json'
        paths = [folder / name for name in names]
        config, settings, tokenizer, vocab = (read_json(path) if path.is_file() else {} for path in paths)
        missing = [name for name in ('vocab.json', 'merges.txt') if not (folder / name).is_file()]
        try:
            if tokenizer:
                vocab, merges, pattern, added = parse_tokenizer(tokenizer)
            elif not missing:
                pattern = QWEN2_PATTERN
                lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
                lines = [line for line in lines if line and not line.startswith('#version')]
                merges = [tuple(line.split(' ')) for line in lines]
                added = settings.get('added_tokens_decoder', {})
                added = [{'id': int(i), **entry} for i, entry in added.items()]
            else:
                raise ValueError(f'no tokenizer here: neither tokenizer.json nor {" and ".join(missing)} '
                                 'found')
            added_ids = {entry['id'] for entry in added}    # GPT-2 lists its own among the text tokens
            tokens = in_merge_order({token: i for token, i in vocab.items() if i not in added_ids}, merges)
            ours = config.get('nanoduplex') or {}
            return cls(tokens, merges, pattern, added, settings, config.get('vocab_size') or 0,
                       ours.get('code_start'), ours.get('n_codes', n_codes), control)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            why = error if isinstance(error, ValueError) else f'no tokenizer that can be read ({error!r})'
            raise ValueError(f'{folder}: {why}') from None

    def encode(self, text):
        """
        Text is NFC-normalised, as Qwen2's was. Names of special tokens stay text: a user who types <|eot|>
        does not end a turn. Half a surrogate pair, which JSON may hold, becomes U+FFFD.
        """
        return self.bpe.encode_ordinary(unicodedata.normalize('NFC', text))

    def decode(self, ids):
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_text:
                raise ValueError(f'id {i} is no text; text has ids 0 to {self.n_text - 1}')
        return self.bpe.decode(ids, errors='replace')   # a character may be cut between two chunks

    def save(self, folder):
        """
        Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt: transformers 4 and 5, vLLM
        and llama.cpp each find what they read. All ids below size get a name, as an id without one crashes
        vLLM's server.
        """
        entries = {entry['id']: entry for entry in self.added}
        names = {i: name for name, i in self.control.items()}
        names |= {self.code_start + code: f'<|s_{code}|>' for code in range(self.n_codes)}
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i in range(self.n_text, self.size):
            entries.setdefault(i, {'id': i, 'content': names.get(i, f'<|reserved_{i}|>'), **flags})
        entries = [entries[i] for i in sorted(entries)]

        vocab = {token: i for i, token in enumerate(self.tokens)}
        merges = [f'{a} {b}' for a, b in self.merges]   # as strings: old versions of tokenizers read no pairs
        byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=False, use_regex=False)
        split = {'type': 'Split', 'pattern': {'Regex': self.pattern}, 'behavior': 'Isolated', 'invert': False}
        tokenizer = {
            'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': entries,
            'normalizer': {'type': 'NFC'},
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
            'post_processor': byte_level, 'decoder': byte_level,
            'model': {
                'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '',
                'end_of_word_suffix': '', 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
                'vocab': vocab, 'merges': merges,
            },
        }
        # without a None, Qwen2Tokenizer would add its <|endoftext|> after our last id
        settings = dict.fromkeys(('bos_token', 'eos_token', 'pad_token', 'unk_token')) | self.settings
        extra = settings.pop('extra_special_tokens', [])    # a list of transformers 5, which 4 cannot read
        special = [*settings.get('additional_special_tokens', []), *extra, *self.control]
        settings |= {
            'tokenizer_class':
                'Qwen2Tokenizer' if self.pattern == QWEN2_PATTERN else 'PreTrainedTokenizerFast',
            'additional_special_tokens': list(dict.fromkeys(special)),
            'added_tokens_decoder': {
                str(entry['id']): {k: v for k, v in entry.items() if k != 'id'} for entry in entries},
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {'tokenizer.json': tokenizer, 'tokenizer_config.json': settings, 'vocab.json': vocab}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
        (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n', encoding='utf-8')


def parse_tokenizer(tokenizer):
    """The content of a tokenizer.json -> vocab, merges, pattern, added tokens."""
    model, normalizer = tokenizer.get('model', {}), tokenizer.get('normalizer')
    pre = tokenizer.get('pre_tokenizer') or {}
    if model.get('type') != 'BPE':
        raise ValueError(f'tokenizer.json has a model of type {model.get("type")}; only BPE is known here')
    if normalizer not in (None, {'type': 'NFC'}):   # None: we do NFC all the same, and save() says so
        raise ValueError(f'tokenizer.json normalises text by {normalizer}; only NFC is known here')
    match pre.get('pretokenizers'):
        case [{'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False},
              {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}]:
            merges = [tuple(pair.split(' ') if isinstance(pair, str) else pair) for pair in model['merges']]
            return model['vocab'], merges, pattern, tokenizer.get('added_tokens', [])
    raise ValueError(f'tokenizer.json has the pre-tokenizer {pre}; known here is only that of Qwen2, '
                     'an isolating Split by a Regex followed by ByteLevel without one')


def in_merge_order(vocab, merges):
    """-> the tokens by id. Raises ValueError unless ids follow the merges: tiktoken knows no merges, it joins
    what gives the lowest id."""
    tokens = sorted(vocab, key=vocab.get)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError('text ids are not 0, 1, 2 ..; train the BPE without special tokens, '
                         'add them afterwards')
    if sorted(token.translate(BYTE_OF_CHAR) for token in tokens[:256]) != [chr(byte) for byte in range(256)]:
        raise ValueError('ids 0 to 255 are not the 256 bytes; '
                         'train with initial_alphabet=ByteLevel.alphabet()')
    made = tokens[:256] + list(dict.fromkeys(a + b for a, b in merges))
    for i, (token, by_merges) in enumerate(zip_longest(tokens, made)):
        if token != by_merges:
            raise ValueError(f'id {i} is {token!r}, but {by_merges!r} by the merges; '
                             'ids have to follow these')
    return tokens
