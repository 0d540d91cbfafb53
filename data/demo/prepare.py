"""
Spoken questions and answers to learn from, made on the spot: espeak-ng reads them in some eighty voices, an
acoustic model of people says them as others would (data/people.py), a codec, which hears through a network
that has heard many people (codec/embedding.py), learns to write down what they say, and out come
dialogues on two channels.

    user       ░░ What is two plus three? ░░                               ░░ Tell me a joke. ░░
    assistant                               ▓▓ Two plus three is five. ▓▓                       ▓▓ I only …

The user has one voice a dialogue, in a room or not, over noise. The assistant always has the same voice, and
answers at once. In some dialogues the user interrupts, and the assistant stops; or says "yeah" into an
answer, and the assistant talks on. The voices of test.arrow and val.arrow are heard nowhere else, neither by
the codec nor in training.

    python data/demo/prepare.py                         # into its own folder, in two minutes on two cores
    python data/demo/prepare.py --say='What is the capital of France?' --wav=question.wav --voice=linda
"""
import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import queue
import sys

import numpy as np
import soxr
import tokenizers
import torch
from tqdm import tqdm

from codec.embedding import SpeechEmbedding
from codec.mel import HOP, PATCH, TYPICAL, MelCodec, mel_filters, spectrum
from common.audio import write_audio
from common.files import read_json, write_json
from data.dialogues import save_dialogues
from data.people import CMU, People, Speaker, heard, noise, stretch
from data.tts import SAMPLE_RATE, TEST_VOICES, VAL_VOICES, Espeak, add_noise, noises, train_voices
from vocabulary import QWEN2_PATTERN

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 1
N_DIALOGUE = 4000         # to train on
N_HELD_OUT = {'val': 100, 'test': 200}       # dialogues in the other splits
N_CLIP = 6000             # that the codec is fitted on: as many users
N_CODES = 512
REACTION = 2              # frames of silence after which the assistant knows that the user has ended: 80 ms
NOTICE = 5                # frames of speech after which it knows that the user interrupts: 200 ms
# fixed, whatever the machine: what espeak-ng says (its noises aside) is the same only if a fresh process says
# the same texts in the same order
N_WORKER = 2
SPAWN = multiprocessing.get_context('spawn')
HOLD = 8                  # frames of a pause in which the codec still names the word before: 320 ms
FRAME = 640               # samples
MAX_FRAME = 230           # 9.2 s: 23 chunks, 506 tokens of duplex3

CAPITALS = {
    'France': 'Paris', 'Germany': 'Berlin', 'Portugal': 'Lisbon', 'Russia': 'Moscow', 'Egypt': 'Cairo',
    'Japan': 'Tokyo', 'Canada': 'Ottawa', 'Peru': 'Lima',
}
NUMBERS = 'zero one two three four five six'.split()
SMALL_TALK = {
    'Hello there.': 'Hello, nice to meet you.',
    'How are you today?': 'I am fine, thank you.',
    'What is your name?': 'My name is Duplex.',
    'Can you hear me?': 'Yes, I hear you well.',
    'Tell me a joke.': 'I only know boring ones.',
    'Thank you very much.': 'You are welcome.',
}
GEOGRAPHY = {
    question.format(country): f'The capital of {country} is {city}.'
    for country, city in CAPITALS.items()
    for question in ('What is the capital of {}?', 'Tell me the capital of {}.')
}
SUMS = {
    f'What is {NUMBERS[a]} plus {NUMBERS[b]}?':
        f'{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}.'
    for a in range(1, 4) for b in range(1, 4)
}
TOPICS = [GEOGRAPHY, SUMS, SMALL_TALK]      # question -> answer
TOPIC_SHARE = [0.5, 0.3, 0.2]               # of each question in a dialogue
ANSWERS = {question: answer for topic in TOPICS for question, answer in topic.items()}
QUESTIONS = list(ANSWERS)
BACKCHANNELS = ['Uh-huh.', 'Yeah.', 'Okay.', 'Right.']     # go on, I am listening


def pick_question(rng):
    topic = list(TOPICS[rng.choice(len(TOPICS), p=TOPIC_SHARE)])
    return topic[rng.integers(len(topic))]


ASSISTANT, ASSISTANT_RATE = 'f1', 200
TRAIN_VOICES = [voice for voice in train_voices() if voice != ASSISTANT]
ACCENTS = ['en-us'] * 4 + ['en', 'en-gb-x-rp', 'en-gb-scotland', 'en-us-nyc', 'en-029', 'en-gb-x-gbclan']
SENTENCES = QUESTIONS + BACKCHANNELS + sorted(set(ANSWERS.values()))
# what the codec learns to name
PHONEMES = ['SIL'] + sorted({*map(' '.join, CMU.values())} - {'SIL'})
WORDS = [''] + sorted({word.strip('.,?').lower() for text in SENTENCES for word in text.split()})


class TrainingVoice:
    """
    A user to learn from: one of espeak-ng's voices, or the same words and times by a person from an acoustic
    model; either as another speaker would say it (data/people.py). Its sound is a spectrum, a row each 10 ms.
    """
    unit = PATCH        # rows in a frame

    def __init__(self, espeak, people, voice, rng):
        self.espeak, self.people, self.voice, self.rng = espeak, people, voice, rng
        self.style = Espeak.style(rng) | {'accent': ACCENTS[rng.integers(len(ACCENTS))]}
        self.person = people.person(rng) if rng.random() < 0.5 else None
        self.speaker = Speaker(rng, (0.75, 1.3) if self.person is None else (0.85, 1.18))

    def say(self, text):
        """-> power (n_hop, n_bin), words and phonemes as lists of (text, first hop)"""
        # of their own: espeak-ng's waves differ by some samples from run to run, what is drawn next must not
        pace, voice = self.rng.spawn(2)
        wave, words, phonemes = self.espeak.say(text, self.voice, **self.style)
        words, phonemes = ([(name, start // HOP) for name, start in part] for part in (words, phonemes))
        if self.person is None:
            power = spectrum(wave).numpy()
        else:
            power = self.people.say(phonemes, -(-len(wave) // HOP), self.person, voice)
        power, marks = stretch(power, [start for _, start in words + phonemes], pace)
        names = [name for name, _ in words + phonemes]
        marked = list(zip(names, marks.tolist()))
        return self.speaker.says(power, voice), marked[:len(words)], marked[len(words):]

    def record(self, power, speech):
        return heard(power, *self.rng.spawn(1))


class UnheardVoice:
    """A user to test with: one of espeak-ng's voices that are used nowhere else, over noise. A wave."""
    unit = FRAME        # samples in a frame

    def __init__(self, espeak, voice, rng):
        self.espeak, self.voice, self.rng = espeak, voice, rng
        self.style = Espeak.style(rng, vary_size=False)

    def say(self, text):
        return self.espeak.say(text, self.voice, **self.style)

    def record(self, wave, speech):
        level = np.mean(np.concatenate(speech) ** 2)
        return spectrum(with_noise(wave, self.rng, self.rng.uniform(15, 50), level)).numpy()


def with_noise(wave, rng, snr_db, level):
    """level: the mean square of the speech."""
    noise = noises()[rng.integers(8)]
    if len(wave) >= len(noise):
        n_sec, longest_sec = len(wave) / SAMPLE_RATE, len(noise) / SAMPLE_RATE
        raise ValueError(f'{n_sec:.0f} s of speech, {longest_sec:.0f} s is the longest there is noise for')
    at = rng.integers(len(noise) - len(wave))
    return add_noise(wave, noise[at:at + len(wave)], snr_db, level)


def word_list(words, first, unit, end_frame):
    """first: where the speech begins. That and the words' starts are in units, the result in frames."""
    starts = [min((first + start) // unit, end_frame) for _, start in words] + [end_frame]
    return [dict(text=text, start=a, end=max(a, b)) for (text, _), a, b in zip(words, starts, starts[1:])]


def hesitate(said, words, phonemes, unit, rng):
    """In three of ten cases somebody pauses before a word, for 0.2 to 0.8 s."""
    if rng.random() < 0.7 or len(words) < 2:
        return said, words, phonemes
    cut, pause = words[rng.integers(1, len(words))][1], int(rng.uniform(0.2, 0.8) * 25 * unit)
    said = np.concatenate([said[:cut], np.zeros((pause, *said.shape[1:]), np.float32), said[cut:]])
    words, phonemes = ([(name, at + pause * (at >= cut)) for name, at in part] for part in (words, phonemes))
    return said, words, sorted([*phonemes, ('_', cut)], key=lambda phoneme: phoneme[1])


def labels_of(n_hop, words, phonemes, end):
    """The phoneme and the word in the middle of each 40 ms, (n_frame, 2), from lists of (text, first hop).
    In a pause it is the word before, for HOLD frames: so codes tell it again once all of it was heard."""
    spoken = [(PHONEMES.index(' '.join(CMU[name])), at) for name, at in phonemes]
    # espeak-ng runs words together now and then: "I am" is one
    meant = [(WORDS.index(text.split()[0].strip('.,?').lower()), at) for text, at in words]
    middle, columns = np.arange(n_hop // PATCH) * PATCH + PATCH // 2, []
    for numbered in spoken, meant:
        start = np.array([0] + [at for _, at in numbered] + [end])
        label = np.array([0] + [number for number, _ in numbered] + [0])
        columns.append(label[np.searchsorted(start, middle, side='right') - 1])
    spoken, meant = columns
    frame = np.arange(len(spoken))
    last = np.maximum.accumulate(np.where(spoken > 0, frame, -1))       # in which something was said
    return np.stack([spoken, np.where((last >= 0) & (frame - last <= HOLD), meant[last], 0)], 1)


def make_clip(espeak, people, rng, i):
    """-> power (n_frame * PATCH, n_bin), labels (n_frame, 2). The first clips are the assistant's sentences,
    as they are; then come users with one or two; now and then nobody speaks."""
    before, after = rng.integers(5, 50, 2)
    if i < len(SENTENCES):
        speech, words, phonemes = espeak.say(SENTENCES[i], ASSISTANT, ASSISTANT_RATE)
        wave = np.pad(speech, (before * HOP, after * HOP))
        words, phonemes = ([(name, start // HOP) for name, start in part] for part in (words, phonemes))
        power, n_hop = spectrum(wave).numpy(), len(speech) // HOP
    elif i % 100 == 0:
        power = noise(100, TYPICAL * 10 ** rng.uniform(-5, -1), 0, rng)
        words, phonemes, n_hop = [], [], 0
    else:
        voice = TrainingVoice(espeak, people, TRAIN_VOICES[i % len(TRAIN_VOICES)], rng)
        words, phonemes, parts, n_hop = [], [], [], 0
        for _ in range(1 + (rng.random() < 0.2)):
            said, *named = hesitate(*voice.say(SENTENCES[rng.integers(len(SENTENCES))]), PATCH, rng)
            for names, marks in zip((words, phonemes), named):
                names += [(name, n_hop + at) for name, at in marks]
            phonemes.append(('_', n_hop + len(said)))
            parts.append(np.pad(said, ((0, rng.integers(10, 200)), (0, 0))))
            n_hop += len(parts[-1])
        power = np.concatenate(parts)
        power = voice.record(np.pad(power, ((before, -(before + n_hop) % PATCH), (0, 0))), None)
    words, phonemes = ([(name, before + at) for name, at in part] for part in (words, phonemes))
    return power, labels_of(len(power), words, phonemes, before + n_hop)


def render_answers():
    """answer -> its wave and words, in the assistant's voice"""
    espeak = Espeak(forgets=True)
    return {text: espeak.say(text, ASSISTANT, ASSISTANT_RATE)[:2] for text in sorted(set(ANSWERS.values()))}


def codes_of(wave, codec):
    """uint16 (ceil(n_sample / FRAME),), with silence before and behind it"""
    return codec.encode(np.pad(wave, (10 * FRAME, 10 * FRAME)))[10:10 - (-len(wave) // FRAME)]


def say_backchannel(voice, answer, rng):
    """Says one of BACKCHANNELS into an answer (its turn) -> (start, speech) and the user's turn, or None
    where the answer is too short for it"""
    unit, text = voice.unit, BACKCHANNELS[rng.integers(len(BACKCHANNELS))]
    said, words, _ = voice.say(text)
    start = int((answer['start'] + rng.uniform(0.1, 0.4) * (answer['end'] - answer['start'])) * unit)
    first, end = start // unit, -(-(start + len(said)) // unit)
    if end >= answer['end']:
        return None
    return (start, said), dict(role='user', start=first, end=end, text=text,
                               words=word_list(words, start, unit, end))


def make_dialogue(voice, answers, rng):
    """
    One user, who asks as many questions as fit, usually two, and says "yeah" into three in ten answers.
    Some dialogues are quiet: one question somewhere in a long silence, in which nobody may speak.

    The user is power (n_frame * PATCH, n_bin). What the assistant says, as [answer, first and end frame], and
    n_frame are what its codes are laid from when there is a codec: see lay.
    """
    unit = voice.unit
    is_quiet = rng.random() < 0.07
    start_sec = rng.uniform(0.1, 3.5) if is_quiet else max(0.1, rng.normal(0.35, 0.1))
    speech, turns = [], []
    start = int(start_sec * 25 * unit)                  # of the next question, in units
    barge_in = 1 if rng.random() < 0.5 else None        # number of the answer that the user interrupts
    assistant = []
    n_frame = n_question = 0
    while True:
        question = pick_question(rng)
        said, words, _ = hesitate(*voice.say(question), unit, rng)
        answer = ANSWERS[question]
        wave, answer_words = answers[answer]
        n_answer = -(-len(wave) // FRAME)
        first, end = start // unit, -(-(start + len(said)) // unit)
        answer_start, answer_end = end + REACTION, end + REACTION + n_answer
        if answer_end + 5 > MAX_FRAME or (is_quiet and turns):
            break
        n_question += 1
        if turns and turns[-1]['end'] > first:      # the user has barged in, the assistant notices
            cut_off = turns[-1]
            stop = min(cut_off['end'], first + NOTICE)
            cut_off['words'] = [word | {'end': min(word['end'], stop)}
                                for word in cut_off['words'] if word['start'] < stop]
            cut_off['text'] = ' '.join(word['text'] for word in cut_off['words'])
            cut_off['end'] = assistant[-1][2] = stop
        speech.append((start, said))
        turns.append(dict(role='user', start=first, end=end, text=question,
                          words=word_list(words, start, unit, end)))
        turns.append(dict(role='assistant', start=answer_start, end=answer_end, text=answer,
                          words=word_list(answer_words, answer_start * FRAME, FRAME, answer_end)))
        assistant.append([answer, answer_start, answer_end])
        n_frame = answer_end
        if n_question == barge_in:
            start = int((answer_start + rng.uniform(0.3, 0.8) * n_answer) * unit)
            continue
        start = answer_end * unit + int(max(0.1, rng.normal(0.5, 0.15)) * 25 * unit)
        if rng.random() < 0.3 and (both := say_backchannel(voice, turns[-1], rng)):
            speech.append(both[0]), turns.append(both[1])
    assert turns, f'a question of {len(said) / unit / 25:.1f} s and its answer do not fit'
    n_frame = MAX_FRAME if is_quiet else min(MAX_FRAME, n_frame + int(rng.uniform(0.3, 1.0) * 25))
    sound = np.zeros((n_frame * unit, *said.shape[1:]), dtype=np.float32)
    for at, said in speech:
        sound[at:at + len(said)] += said
    user = voice.record(sound, [said for _, said in speech])
    return dict(user=user, assistant=assistant, n_frame=n_frame, turns=turns)


def make_all(number, folder, fitted, n_clip, n_dialogue, answers, results):
    """One process: every N_WORKER-th clip for the codec, and every N_WORKER-th record of every split, in a
    fixed order. Records are rendered while the codec is fitted, and become codes afterwards."""
    torch.set_num_threads(1)
    espeak, people, filters, made = Espeak(), People(), mel_filters(SAMPLE_RATE).numpy(), {}
    for i in range(number, n_clip, N_WORKER):
        power, labels = make_clip(espeak, people, np.random.default_rng([SEED, *b'clip', i]), i)
        results.put((i, (power @ filters, labels)))
    os.nice(10)     # the codec's steps come first: they take longer, and nothing goes on without them
    for split, voices in ('test', TEST_VOICES), ('val', VAL_VOICES), ('train', TRAIN_VOICES):
        for i in range(number, n_dialogue[split], N_WORKER):
            rng, name = np.random.default_rng([SEED, *split.encode(), i]), voices[i % len(voices)]
            voice = UnheardVoice(espeak, name, rng) if split != 'train' \
                else TrainingVoice(espeak, people, name, rng)
            record = make_dialogue(voice, answers, rng)
            made[split, i] = record | {'id': f'{split}-{i:05d}-{name}', 'user': record['user'] @ filters}
    fitted.wait()
    codec = MelCodec.load(os.path.join(folder, 'codec'))
    said, keys = {text: codes_of(wave, codec) for text, (wave, _) in answers.items()}, list(made)
    silence = codec.encode(np.zeros(FRAME))[0]
    for some in (keys[at:at + 32] for at in range(0, len(keys), 32)):
        users = codec.encode_power([torch.from_numpy(made[key]['user']) for key in some])
        for key, user in zip(some, users):
            results.put((key, lay(made.pop(key), user, said, silence)))


def lay(record, user, said, silence):
    """Both channels of a rendered record as codes. said: {answer: its codes}"""
    assistant = np.full(record['n_frame'], silence, dtype=np.uint16)
    for answer, start, end in record['assistant']:
        assistant[start:end] = said[answer][:end - start]
    return dict(id=record['id'], user=user, assistant=assistant, turns=record['turns'])


def start(*arguments):
    """make_all(number, *arguments, results) in N_WORKER processes -> queue of results, processes"""
    # numpy's matrix products would take a thread a core in each process, which wait for each other by
    # spinning: a clip would take 14 ms instead of 6
    os.environ['OPENBLAS_NUM_THREADS'] = '1'
    results = SPAWN.Queue()
    workers = [SPAWN.Process(target=make_all, args=(i, *arguments, results), daemon=True)
               for i in range(N_WORKER)]
    for worker in workers:
        worker.start()
    return results, workers


def gather(results, workers, n_result, desc, unit):
    """What they have put there -> {key: result}"""
    found = {}
    for _ in tqdm(range(n_result), desc=desc, unit=unit, mininterval=1):
        while True:
            try:
                key, found[key] = results.get(timeout=5)
                break
            except queue.Empty:
                if any(worker.exitcode for worker in workers):
                    raise SystemExit('a worker process died; its message is above') from None
    return found


def train_bpe(folder):
    """Byte-level BPE cut up as Qwen2 does, until every word of ours is one token."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), 'isolated'),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(QUESTIONS + list(ANSWERS.values()), trainer)
    os.makedirs(folder, exist_ok=True)
    bpe.save(os.path.join(folder, 'tokenizer.json'))
    bpe.model.save(folder)
    return bpe.get_vocab_size()


def round_trip(answers, codec):
    """What becomes of the answers on their way through the codec."""
    same, contour, longer = [], [], []
    for wave, _ in answers.values():
        wave = np.pad(wave, SAMPLE_RATE // 5)
        codes = codec.encode(wave)
        heard = codec.decode(codes)
        wave = np.pad(wave, (0, len(codes) * FRAME - len(wave)))
        energy = [np.mean(x.reshape(-1, FRAME) ** 2, axis=1) for x in (wave, heard)]
        contour.append(np.corrcoef(*(np.log(e + 1e-4 * e.max()) for e in energy))[0, 1])
        same.append(codec.encode(heard) == codes)
        longer.append(abs(len(heard) / len(wave) - 1))
    return dict(same_codes=np.mean(np.concatenate(same)), loudness_correlation=np.mean(contour),
                duration_error=max(longer))


def prepare(out, n_train_dialogue, n_clip):
    """Fits the codec and the BPE and writes the three splits. prepared.json comes last: it is there only if
    all the rest is."""
    what = json.dumps([n_train_dialogue, n_clip])
    sources = (__name__, *(each.__module__ for each in (Espeak, People, MelCodec, SpeechEmbedding)))
    what += ''.join(inspect.getsource(sys.modules[name]) for name in sources)
    recipe, marker = hashlib.sha256(what.encode()).hexdigest()[:16], os.path.join(out, 'prepared.json')
    if min(n_train_dialogue, n_clip) < N_CODES // 10:
        raise ValueError(f'--n_dialogue and --n_clip have to be {N_CODES // 10} at least')
    paths = [marker, *(os.path.join(out, f'{split}.arrow') for split in ('train', *N_HELD_OUT))]
    if all(map(os.path.exists, paths)) and read_json(marker)['recipe'] == recipe:
        return print(f'{out} is prepared already')
    embedding = SpeechEmbedding.pretrained()
    os.makedirs(out, exist_ok=True)
    if os.path.exists(marker):
        os.remove(marker)
    answers, n_dialogue, fitted = render_answers(), {'train': n_train_dialogue, **N_HELD_OUT}, SPAWN.Event()
    working = start(out, fitted, n_clip, n_dialogue, answers)
    clips = gather(*working, n_clip, 'codec clips', 'clip')
    powers, labels = zip(*(clips[i] for i in range(n_clip)))
    is_mine = np.arange(n_clip) < len(SENTENCES)
    codec = MelCodec.fit(list(map(torch.from_numpy, powers)), labels, is_mine, embedding, n_codes=N_CODES)
    codec.save(os.path.join(out, 'codec'))
    fitted.set()
    records = gather(*working, sum(n_dialogue.values()), 'dialogues', 'dialogue')
    n_bpe = train_bpe(os.path.join(out, 'tokenizer'))
    statistics = {'recipe': recipe, 'n_bpe': n_bpe, **round_trip(answers, codec)}
    for split in n_dialogue:
        found = [records[key] for key in sorted(records) if key[0] == split]
        save_dialogues(os.path.join(out, f'{split}.arrow'), found, codec.describe())
        statistics[split] = dict(
            n_dialogue=len(found), n_voice=len({record['id'].split('-')[2] for record in found}),
            hours=round(sum(len(record['user']) for record in found) * FRAME / SAMPLE_RATE / 3600, 2),
            n_question=sum(turn['role'] == 'user' for record in found for turn in record['turns']))
    for key, value in statistics.items():
        print(f'{key:20} {value if not isinstance(value, float) else round(value, 4)}')
    write_json(marker, statistics)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default=HERE, help='folder to write into')
    parser.add_argument('--n_dialogue', type=int, default=N_DIALOGUE, help='dialogues to train on')
    parser.add_argument('--n_clip', type=int, default=N_CLIP, help='clips that the codec is fitted on')
    parser.add_argument('--say', help='instead: read this aloud into a wav')
    parser.add_argument('--wav', default='question.wav')
    parser.add_argument('--voice', default=TEST_VOICES[0])
    parser.add_argument('--rate', type=int, default=170, help='words a minute')
    parser.add_argument('--pitch', type=int, default=50, help='0 to 99')
    parser.add_argument('--sample_rate', type=int, default=44100)
    parser.add_argument('--snr_db', type=float, default=25.0, help='of the noise under it')
    args = parser.parse_args()
    if args.say is None:
        return prepare(args.out, args.n_dialogue, args.n_clip)
    speech = Espeak().say(args.say, args.voice, args.rate, args.pitch)[0]
    wave = np.pad(speech, SAMPLE_RATE // 2)
    wave = with_noise(wave, np.random.default_rng(SEED), args.snr_db, np.mean(speech ** 2))
    wave = soxr.resample(0.5 * wave / np.abs(wave).max(), SAMPLE_RATE, args.sample_rate)
    write_audio(args.wav, wave, args.sample_rate)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
