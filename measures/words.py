"""
Are the words right: error rates of what the model hears and says.

    asr_user, asr_assistant     the turn's codes ─► the model's ASR ─► text, compared with the turn's
    tts_assistant               the turn's text ─► the model's TTS ─► codes ─► its ASR ─► text, likewise
    tts_assistant_whisper       … its TTS ─► codes ─► codec ─► Whisper ─► text, likewise

asr_assistant, and asr_assistant_whisper, are the yardsticks of the last two: the same ears on the recorded
codes.

    model, vocab, codec, info = load_checkpoint('out/align')
    figures = alignment(model, vocab, codec, dialogues, tts=['assistant'], text_weight=info.text_weight)
    figures['asr_user']['wer'], figures['asr_user']['pairs'][0]     # a rate; (what was said, what was heard)

Texts are compared as in Whisper's paper (arXiv 2212.04356, appendix C): by its normaliser, then jiwer.
Languages that put no spaces between words, such as Chinese and Japanese, are counted in characters. pip
install jiwer whisper-normalizer; for Whisper transformers soxr.
"""
import math
import os
import re
from functools import cache

import numpy as np
import torch

from common.files import read_json
from flatten import ROLES, check, get_layout, is_broken_off, lay_turn
from model import KVCache

# Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = re.compile(
    '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]')


def error_rate(references, hypotheses, language='en'):
    """-> dict(wer, n_word, cer, n_char, substitutions, deletions, insertions): wer over the texts whose
    reference has spaces between its words, cer over the others, each errors / units of the references, None
    where there are none; then the errors of both. What is heard where nothing was said is an insertion.
    Spaced texts of another language than 'en' keep their "um"."""
    try:
        import jiwer
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ModuleNotFoundError as error:
        raise ValueError(f'error rates need {error.name}: pip install jiwer whisper-normalizer') from None
    # marks are the vowel signs of Thai and Hindi, which Whisper's own drops
    spaced = EnglishTextNormalizer() if language == 'en' else BasicTextNormalizer(preserve_marks=True)
    unspaced = BasicTextNormalizer(preserve_marks=True, split_letters=True)
    figures = dict(wer=None, n_word=0, cer=None, n_char=0, substitutions=0, deletions=0, insertions=0)
    for rate, n, normalise in (('wer', 'n_word', spaced), ('cer', 'n_char', unspaced)):
        chosen = [i for i, text in enumerate(references) if bool(UNSPACED.search(text)) == (rate == 'cer')]
        counts = jiwer.process_words(
            *([normalise(texts[i]) for i in chosen] for texts in (references, hypotheses)))
        errors = {kind: getattr(counts, kind) for kind in ('substitutions', 'deletions', 'insertions')}
        figures[n] = counts.hits + counts.substitutions + counts.deletions
        figures[rate] = sum(errors.values()) / figures[n] if figures[n] else None
        figures.update({kind: figures[kind] + n_error for kind, n_error in errors.items()})
    return figures


# ------------------------------------------------------------------------------------------------------------
# the model's own ASR and TTS

@torch.inference_mode()
def complete(model, prompts, allowed, stop, n_most, batch_size=32, stop_bias=0.0, temperature=0.0, seed=1337):
    """
    prompts [[ids]] -> [[ids]], what follows each: ids of the range (first, end) allowed, up to stop, which is
    left out, or n_most[i] ids. Prompts of about one length share a batch: all are read to the end of the
    shortest at once, then an id a pass, in which a row reads on in its prompt as long as that lasts. So all
    rows are at one position, as in KVCache:

        prompt, said   a b c │ x y .
                       a b c │ d x .
                       a b c │ d e x y z .
    """
    device, (first, end) = model.model.norm.weight.device, allowed
    generator = torch.Generator(device).manual_seed(seed)
    stretch = slice(min(first, stop), max(end, stop + 1))       # a view of the head, not a copy
    bias = torch.full((stretch.stop,), -torch.inf, device=device)
    bias[first:end], bias[stop] = 0.0, stop_bias
    order, said = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
    for at in range(0, len(prompts), batch_size):
        rows = order[at:at + batch_size]
        starts = [len(prompts[i]) for i in rows]
        limits = [start + n_most[i] for start, i in zip(starts, rows)]
        ids = torch.full((len(rows), max(limits)), stop)
        for row, start, i in zip(ids, starts, rows):
            row[:start] = torch.as_tensor(np.asarray(prompts[i], np.int64))
        ids, start, limit = ids.to(device), torch.tensor(starts,
                                                         device=device), torch.tensor(limits, device=device)
        cache, n_read, is_done = KVCache(model, len(rows), ids.shape[1]), 0, start >= limit
        for n in range(starts[0], ids.shape[1]):        # ids[:, :n] are known
            last = torch.arange(1, len(rows) + 1, device=device) * (n - n_read) - 1
            # (B, stretch)
            logits = model(ids[:, n_read:n], learn=last, kv_cache=cache, ids=stretch) + bias[stretch]
            token = torch.multinomial(
                (logits
                 / temperature).softmax(-1), 1, generator=generator)[:,
                                                                     0] if temperature else logits.argmax(-1)
            ids[:, n] = torch.where((n >= start) & ~is_done, token + stretch.start, ids[:, n])
            is_done |= (n >= start) & (ids[:, n] == stop) | (n + 1 >= limit)
            if is_done.all():
                break
            n_read = n
        for i, row, start, limit in zip(rows, ids.tolist(), starts, limits):
            said[i] = row[start:row.index(stop, start) if stop in row[start:limit] else limit]
    return said


def prompt(layout, vocab, codes=(), text=''):
    """What stands in asr, or tts, before the text, or the codes, that are to be found: all but the token that
    ends them."""
    turn = dict(role='user', start=0, end=len(codes), text=text)
    return lay_turn(dict(user=codes), turn, get_layout(layout).slots['user'], vocab).ids[:-1]


def transcribe(model, vocab, codes, batch_size=32):
    """[codes of an utterance] -> [text], of at most a token a frame."""
    prompts, n_most = [prompt('asr', vocab, codes=each) for each in codes], [len(each) for each in codes]
    return [
        vocab.decode(ids)
        for ids in complete(model, prompts, (0, vocab.n_text), vocab.control['<|eot|>'], n_most, batch_size)]


def speak(model, vocab, texts, batch_size=32, text_weight=1.0, frames_a_token=32, temperature=0.0, seed=1337):
    """[text] -> [codes], cut off where they are four times as long as speech is, which takes about 8 frames a
    token at 25 Hz. In training <|eos|> weighs text_weight times what a code does, so it comes that much
    likelier than it is: that is taken back."""
    prompts, n_most = [prompt('tts', vocab, text=text) for text in texts
                       ], [frames_a_token * (len(vocab.encode(text)) + 2) for text in texts]
    codes = vocab.code_start, vocab.code_start + vocab.n_codes
    said = complete(model, prompts, codes, vocab.control['<|eos|>'], n_most, batch_size,
                    -math.log(text_weight), temperature, seed)
    return [[i - vocab.code_start for i in ids] for ids in said]


def whole(turns, role):
    """The role's turns that have a text and were not broken off by the other side, as then there is more text
    than speech."""
    return [
        turn for turn in turns
        if turn['role'] == role and turn['text'].strip() and not is_broken_off(turn, turns)]


def alignment(model, vocab, codec, dialogues, asr=ROLES, tts=ROLES, whisper=None, language='en',
              batch_size=32, text_weight=1.0):
    """-> {'asr_user': error_rate over all its turns, and pairs=[(reference, hypothesis)], 'tts_assistant':
    …}, for the roles in
    asr and tts: those that training had. A role in tts is heard, too: its yardstick. whisper, a folder, hears
    all once more."""
    figures = {}

    def hear(name, texts, codes):
        heard = {name: transcribe(model, vocab, codes, batch_size)}
        if whisper:
            waves = [
                codec.decode(np.asarray(each)) if len(each) else np.zeros(0, np.float32) for each in codes]
            heard[name + '_whisper'] = whisper_transcribe(waves, codec.sample_rate, whisper, language,
                                                          device=model.model.norm.weight.device)
        figures.update({
            key: dict(error_rate(texts, found, language), pairs=list(zip(texts, found)))
            for key, found in heard.items()})

    for dialogue in dialogues:
        check(dialogue, vocab.n_codes)
    for role in ROLES:
        turns = [(dialogue[role][turn['start']:turn['end']], turn['text'])
                 for dialogue in dialogues
                 for turn in whole(dialogue['turns'], role)]
        texts = [text for _, text in turns]
        if role in asr or role in tts:
            hear('asr_' + role, texts, [codes for codes, _ in turns])
        if role in tts:
            hear('tts_' + role, texts, speak(model, vocab, texts, batch_size, text_weight))
    return figures


# ------------------------------------------------------------------------------------------------------------
# Whisper

@cache
def load_whisper(folder, device):
    try:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor
    except ModuleNotFoundError as error:
        raise ValueError(f'Whisper needs {error.name}: pip install transformers') from None
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        raise ValueError(f'no Whisper in {folder}: it has no config.json (download all files of '
                         'openai/whisper-large-v3, and give their folder)')
    kind = read_json(path).get('model_type')
    if kind != 'whisper':       # transformers would warn, and draw random weights
        raise ValueError(f'{path} is of a {kind} model: give the folder of a Whisper')
    try:
        processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        return WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True).to(
            device).eval(), processor
    except (OSError, TypeError) as error:
        raise ValueError(f'no complete Whisper in {folder} ({error}): download all its files again') from None


def pieces(wave, n):
    """Cuts of at most n samples, each made at the quietest of the last 16 hundredths of n."""
    cuts, window = [], n // 100
    while len(wave) > n:
        energy = np.square(wave[n - 16 * window:n]).reshape(16, window).sum(1)
        at = n - 16 * window + int(energy.argmin()) * window + window // 2
        cuts, wave = cuts + [wave[:at]], wave[at:]
    return cuts + [wave]


@torch.inference_mode()
def whisper_transcribe(waves, sample_rate, folder, language=None, batch_size=16, device='cpu'):
    """[float32 mono] -> [text], greedily, by the Whisper in folder. Without a language each wave's is
    guessed. What is longer than 30 s is cut where it is quiet; what stays below -60 dB is '', as Whisper
    hears a "Thank you." in silence."""
    model, processor = load_whisper(folder, torch.device(device))
    extractor, is_multilingual = processor.feature_extractor, getattr(model.generation_config,
                                                                      'is_multilingual', False)
    if language not in (None, 'en') and not is_multilingual:
        raise ValueError(f'{folder} knows English only, not {language!r}: take a Whisper without .en in its '
                         'name')
    if sample_rate != extractor.sampling_rate:
        import soxr  # pip install soxr
        waves = [
            soxr.resample(wave, sample_rate, extractor.sampling_rate) if len(wave) else wave for wave in waves
        ]
    parts = [(i, part)
             for i, wave in enumerate(waves)
             for part in pieces(wave, extractor.n_samples)
             if np.abs(part).max(initial=0) > 1e-3]
    texts = [[] for _ in waves]
    for at in range(0, len(parts), batch_size):
        owners, batch = zip(*parts[at:at + batch_size])
        heard = extractor(list(batch), sampling_rate=extractor.sampling_rate, return_tensors='pt',
                          return_attention_mask=True)
        ids = model.generate(**heard.to(model.device),
                             **(dict(language=language, task='transcribe') if is_multilingual else {}))
        for i, text in zip(owners, processor.batch_decode(ids, skip_special_tokens=True)):
            texts[i].append(text.strip())
    return [' '.join(each) for each in texts]


def said_as_written(conversations, folder, language='en', device='cpu'):
    """Does the assistant say what it writes: error_rate, with pairs, of what Whisper hears in its turns
    against their texts."""
    texts, heard = [], []
    for talk in conversations:
        if talk['wave'] is None:
            raise ValueError(f'conversation {talk["id"]!r} has no audio that Whisper could hear')
        turns, a_frame = whole(talk['turns'], 'assistant'), talk['sample_rate'] / talk['rate_hz']
        waves = [
            talk['wave'][round(turn['start'] * a_frame):round(turn['end'] * a_frame), 1] for turn in turns]
        texts += [turn['text'] for turn in turns]
        heard += whisper_transcribe(waves, talk['sample_rate'], folder, language, device=device)
    return dict(error_rate(texts, heard, language), pairs=list(zip(texts, heard)))
