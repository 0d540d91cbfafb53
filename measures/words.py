"""
Error rates of the words that the model recognises and of those that it says.

    asr_user, asr_assistant     a turn's codes ─► the model's ASR ─► text, compared with the turn's text
    tts_assistant               a turn's text ─► the model's TTS ─► codes ─► the model's ASR ─► text, likewise
    tts_assistant_whisper       a turn's text ─► the model's TTS ─► codec ─► Whisper ─► text, likewise

Compare tts_assistant with asr_assistant, and tts_assistant_whisper with asr_assistant_whisper: there the same
recogniser hears the recorded codes, so these are the errors that it makes by itself.

    model, vocab, codec, info = load_checkpoint('out/align')
    figures = alignment(model, vocab, codec, dialogues, tts=['assistant'], text_weight=info.text_weight)
    figures['asr_user']['wer'], figures['asr_user']['pairs'][0]     # a rate; (reference, hypothesis)

Texts are compared as in Whisper's paper (arXiv 2212.04356, appendix C): its normaliser first, then jiwer.
Languages without spaces between words, such as Chinese and Japanese, are counted in characters.
pip install jiwer whisper-normalizer; Whisper itself needs transformers and soxr.
"""
import math
import os
import re
from functools import cache

import numpy as np
import torch

from clock import is_broken_off
from common.files import read_json
from flatten import ROLES, check, get_layout, lay_line
from model import KVCache

# Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = re.compile(
    '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]')


def error_rate(references, hypotheses, language='en'):
    """
    -> dict(wer, n_word, cer, n_char, substitutions, deletions, insertions). wer is over the texts whose
    reference has spaces between its words, cer over the others: errors / units of the references, None where
    there are no units. The last three count the errors of both. A hypothesis where the reference is empty is
    an insertion. Spaced texts of another language than 'en' keep their "um".
    """
    try:
        import jiwer
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ModuleNotFoundError as error:
        raise ValueError(f'error rates need {error.name}: pip install jiwer whisper-normalizer') from None
    # marks are the vowel signs of Thai and Hindi; Whisper's own normaliser drops them
    spaced = EnglishTextNormalizer() if language == 'en' else BasicTextNormalizer(preserve_marks=True)
    unspaced = BasicTextNormalizer(preserve_marks=True, split_letters=True)
    figures = dict(wer=None, n_word=0, cer=None, n_char=0, substitutions=0, deletions=0, insertions=0)
    for rate, n, normalise in (('wer', 'n_word', spaced), ('cer', 'n_char', unspaced)):
        chosen = [i for i, text in enumerate(references) if bool(UNSPACED.search(text)) == (rate == 'cer')]
        counts = jiwer.process_words([normalise(references[i]) for i in chosen],
                                     [normalise(hypotheses[i]) for i in chosen])
        errors = {kind: getattr(counts, kind) for kind in ('substitutions', 'deletions', 'insertions')}
        figures[n] = counts.hits + counts.substitutions + counts.deletions
        figures[rate] = sum(errors.values()) / figures[n] if figures[n] else None
        figures.update({kind: figures[kind] + n_error for kind, n_error in errors.items()})
    return figures


def plain(text):
    """Lower case, letters and digits: 'Paris.' and 'paris' are the same answer."""
    return ' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split())


# ------------------------------------------------------------------------------------------------------------
# the model's own ASR and TTS

@torch.inference_mode()
def complete(model, prompts, allowed, stop, n_most, batch_size=32, stop_bias=0.0, temperature=0.0, seed=1337):
    """
    prompts [[ids]] -> [[ids]], what the model says after each prompt: ids in the range allowed, (first, end),
    until it chooses the id stop, or n_most[i] of them. stop_bias is added to the logit of stop.

    Prompts of similar length share a batch. All rows of a batch stay at one position, as KVCache needs it:
    the first pass reads all prompts up to the end of the shortest, each later pass one id a row. A row whose
    prompt is longer takes that id from its prompt, the others take the id that they have just chosen:

        prompt, said   a b c │ x y .
                       a b c │ d x .
                       a b c │ d e x y z .
    """
    device, (first, end) = model.model.norm.weight.device, allowed
    generator = torch.Generator(device).manual_seed(seed)
    stretch = slice(min(first, stop), max(end, stop + 1))       # a view of the head, not a copy
    bias = torch.full((stretch.stop,), -torch.inf, device=device)
    bias[first:end], bias[stop] = 0.0, stop_bias
    bias = bias[stretch]

    def choose(logits):     # (B, stretch) -> ids (B)
        logits = logits + bias
        if not temperature:
            return logits.argmax(-1) + stretch.start
        probs = (logits / temperature).softmax(-1)
        return torch.multinomial(probs, 1, generator=generator)[:, 0] + stretch.start

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said = [None] * len(prompts)
    for at in range(0, len(prompts), batch_size):
        batch = order[at:at + batch_size]
        limits = [len(prompts[i]) + n_most[i] for i in batch]
        rows = complete_batch(model, [prompts[i] for i in batch], limits, stop, stretch, choose)
        for i, row in zip(batch, rows):
            said[i] = row
    return said


def complete_batch(model, prompts, limits, stop, stretch, choose):
    """prompts, the shortest first -> [[ids]]. limits: how long each may become with what is said after it;
    stretch: the ids to score, a slice; choose: their logits (B, stretch) -> ids (B)"""
    device, B, starts = model.model.norm.weight.device, len(prompts), [len(prompt) for prompt in prompts]
    ids = torch.full((B, max(limits)), stop)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = torch.as_tensor(np.asarray(prompt, np.int64))
    ids = ids.to(device)
    start, limit = torch.tensor(starts, device=device), torch.tensor(limits, device=device)     # (B)
    kv_cache, n_read, is_done = KVCache(model, B, ids.shape[1]), 0, start >= limit
    for n in range(starts[0], ids.shape[1]):        # ids[:, :n] are known, ids[:, :n_read] are in the cache
        last = torch.arange(1, B + 1, device=device) * (n - n_read) - 1     # the last id read in each row
        token = choose(model(ids[:, n_read:n], learn=last, kv_cache=kv_cache, ids=stretch))     # (B)
        is_choosing = n >= start
        ids[:, n] = torch.where(is_choosing & ~is_done, token, ids[:, n])
        is_done |= is_choosing & (ids[:, n] == stop) | (n + 1 >= limit)
        if is_done.all():
            break
        n_read = n
    said = [row[start:limit] for row, start, limit in zip(ids.tolist(), starts, limits)]
    return [row[:row.index(stop)] if stop in row else row for row in said]


def make_prompt(layout, vocab, codes=(), text=''):
    """-> the ids of an asr document that stand before its text, or of a tts document before its codes"""
    # with nothing to say, a document is the prompt and the control token that ends it
    turn, layout = dict(role='user', start=0, end=len(codes), text=text), get_layout(layout)
    return lay_line(layout.slots['user'], dict(user=codes), {'': turn}, vocab, layout).ids[:-1]


def transcribe(model, vocab, utterances, batch_size=32):
    """[codes of an utterance] -> [text], each of at most a token a frame."""
    prompts = [make_prompt('asr', vocab, codes=codes) for codes in utterances]
    n_most = [len(codes) for codes in utterances]
    said = complete(model, prompts, (0, vocab.n_text), vocab.control['<|eot|>'], n_most, batch_size)
    return [vocab.decode(ids) for ids in said]


def speak(model, vocab, texts, batch_size=32, text_weight=1.0, frames_a_token=32, temperature=0.0, seed=1337):
    """
    [text] -> [codes]. Speech takes about 8 frames a text token at 25 Hz; it is cut off where it is four times
    as long. text_weight is that of training: there <|eos|> weighs text_weight times as much as a code, so the
    model finds it that much likelier than it is. A bias on <|eos|> takes this back.
    """
    prompts = [make_prompt('tts', vocab, text=text) for text in texts]
    n_most = [frames_a_token * (len(vocab.encode(text)) + 2) for text in texts]
    allowed = vocab.code_start, vocab.code_start + vocab.n_codes
    said = complete(model, prompts, allowed, vocab.control['<|eos|>'], n_most, batch_size,
                    -math.log(text_weight), temperature, seed)
    return [[i - vocab.code_start for i in ids] for ids in said]


def finished_turns(turns, role):
    """The role's turns that have a text and were spoken to their end. A turn that the other side broke off
    has more text than speech, so its text is no reference for its speech."""
    own = [turn for turn in turns if turn['role'] == role and turn['text'].strip()]
    return [turn for turn in own if not is_broken_off(turn, turns)]


def alignment(model, vocab, codec, dialogues, asr=ROLES, tts=ROLES, whisper=None, language='en',
              batch_size=32, text_weight=1.0):
    """
    -> {'asr_user': error_rate over all turns of the user, with pairs=[(reference, hypothesis)],
    'tts_assistant': …}. Raises ValueError where a dialogue is wrong or a package is missing.
    asr, tts: the roles that were trained in these layouts. A role in tts gets its asr figure too, to compare
    whisper: a folder with a Whisper, which hears everything as well; None: without it
    """
    for dialogue in dialogues:
        check(dialogue, vocab.n_codes)
    figures = {}
    for role in ROLES:
        turns = [(dialogue[role][turn['start']:turn['end']], turn['text'])
                 for dialogue in dialogues for turn in finished_turns(dialogue['turns'], role)]
        recorded, texts = [codes for codes, _ in turns], [text for _, text in turns]
        speech = {}     # name of the figure -> [codes of each text]
        if role in asr or role in tts:
            speech['asr_' + role] = recorded
        if role in tts:
            speech['tts_' + role] = speak(model, vocab, texts, batch_size, text_weight)
        for name, utterances in speech.items():
            heard = {name: transcribe(model, vocab, utterances, batch_size)}
            if whisper:
                silence = np.zeros(0, np.float32)
                waves = [codec.decode(np.asarray(codes)) if len(codes) else silence for codes in utterances]
                heard[name + '_whisper'] = whisper_transcribe(waves, codec.sample_rate, whisper, language,
                                                              device=model.model.norm.weight.device)
            for key, hypotheses in heard.items():
                pairs = list(zip(texts, hypotheses))
                figures[key] = dict(error_rate(texts, hypotheses, language), pairs=pairs)
    return figures


# ------------------------------------------------------------------------------------------------------------
# Whisper

@cache
def load_whisper(folder, device):
    """-> (model, processor). Raises ValueError if the folder holds no Whisper, or only a part of one."""
    try:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor
    except ModuleNotFoundError as error:
        raise ValueError(f'Whisper needs {error.name}: pip install transformers') from None
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        raise ValueError(f'no Whisper in {folder}: it has no config.json (download all files of '
                         'openai/whisper-large-v3, and give their folder)')
    kind = read_json(path).get('model_type')
    if kind != 'whisper':       # transformers would only warn, and draw random weights
        raise ValueError(f'{path} is of a {kind} model: give the folder of a Whisper')
    try:
        processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        model = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError) as error:
        raise ValueError(f'no complete Whisper in {folder} ({error}): download all its files again') from None
    return model.to(device).eval(), processor


def cut_at_quiet(wave, n):
    """[n_sample] -> pieces of at most n samples. Each cut is made at the quietest of the last 16 hundredths
    of n."""
    pieces, window = [], n // 100
    while len(wave) > n:
        energy = np.square(wave[n - 16 * window:n]).reshape(16, window).sum(1)
        at = n - 16 * window + int(energy.argmin()) * window + window // 2
        pieces, wave = pieces + [wave[:at]], wave[at:]
    return pieces + [wave]


@torch.inference_mode()
def whisper_transcribe(waves, sample_rate, folder, language=None, batch_size=16, device='cpu'):
    """
    [float32 mono] -> [text], greedily, by the Whisper in folder. Without a language, Whisper guesses that of
    each wave. Waves of more than 30 s are cut where they are quiet. Pieces that stay below -60 dB give '', as
    Whisper hears a "Thank you." in silence. Raises ValueError as load_whisper does, or for a language that
    an English Whisper does not know.
    """
    model, processor = load_whisper(folder, torch.device(device))
    extractor = processor.feature_extractor
    is_multilingual = getattr(model.generation_config, 'is_multilingual', False)
    if language not in (None, 'en') and not is_multilingual:
        raise ValueError(f'{folder} knows English only, not {language!r}: take a Whisper without .en in its '
                         'name')
    if sample_rate != extractor.sampling_rate:
        import soxr  # pip install soxr
        waves = [soxr.resample(wave, sample_rate, extractor.sampling_rate) if len(wave) else wave
                 for wave in waves]
    pieces = [(i, piece) for i, wave in enumerate(waves) for piece in cut_at_quiet(wave, extractor.n_samples)]
    pieces = [(i, piece) for i, piece in pieces if np.abs(piece).max(initial=0) > 1e-3]
    options = dict(language=language, task='transcribe') if is_multilingual else {}
    texts = [[] for _ in waves]     # of each wave, those of its pieces
    for at in range(0, len(pieces), batch_size):
        owners, batch = zip(*pieces[at:at + batch_size])
        inputs = extractor(list(batch), sampling_rate=extractor.sampling_rate, return_tensors='pt',
                           return_attention_mask=True)
        ids = model.generate(**inputs.to(model.device), **options)
        for i, text in zip(owners, processor.batch_decode(ids, skip_special_tokens=True)):
            texts[i].append(text.strip())
    return [' '.join(parts) for parts in texts]


def said_as_written(conversations, folder, language='en', device='cpu'):
    """Does the assistant say what it writes? -> error_rate, with pairs, of what Whisper hears in its turns
    against their texts. Raises ValueError for a conversation without audio."""
    texts, heard = [], []
    for talk in conversations:
        if talk['wave'] is None:
            raise ValueError(f'conversation {talk["id"]!r} has no audio that Whisper could hear')
        turns = finished_turns(talk['turns'], 'assistant')
        hop = talk['sample_rate'] / talk['rate_hz']     # samples a frame
        waves = [talk['wave'][round(turn['start'] * hop):round(turn['end'] * hop), 1] for turn in turns]
        texts += [turn['text'] for turn in turns]
        heard += whisper_transcribe(waves, talk['sample_rate'], folder, language, device=device)
    return dict(error_rate(texts, heard, language), pairs=list(zip(texts, heard)))
