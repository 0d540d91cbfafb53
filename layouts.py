"""
Layouts: in which order the streams of a dialogue follow each other, and what of them is learned.

An entry of LAYOUTS is an order and a line of streams, by which flatten.py lays dialogues. The orders:

    turn        each turn is a document of its own
    pair        each turn of the user, with the turn that answers it
    turns       all turns follow each other in one document; each role has a line, and so has the start
    segments    stretches of speech or of text, at random (templates.py)
    chunks      portions of the streams take turns for as long as the dialogue lasts

What stands in a line:

    <|sos|>             a control token
    "### User\\n"        literal text
    user.speech         a stream: codes of a turn (speech), its text, its words, the prompt of the dialogue,
                        the state (was the assistant interrupted?). Without a role: of whoever has the turn
    user.speech 10      so many tokens a chunk. Speech counts in frames, or in time, rounded to frames: 80ms
    speech +0 +1 +1     a frame has three codes; in chunks and rows the last two are laid one step late
    text@word           a stream that is laid in a way of its own: see WAYS
    ~                   before any of these: it is fed, not learned
    [text 13 : speech 26]           portions in turn, until both have ended
    [text | speech +1 +2 +3]        rows side by side, column by column, a frame in each
    {word <|sep|> speech}           once for each word of the turn
    {word / <|sep|>}                likewise, but <|sep|> only between two words

In OmniFlatten's layouts the user is listened to, not imitated: their speech is fed, not learned (paper,
section 3.3: training is steadier so, as the user's channel is noisy).
"""
import difflib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from common.levels import codes_per_frame

ROLES = ('user', 'assistant')

LAYOUTS = {
    # OmniFlatten, arXiv:2410.17799
    'asr':         ('turn',   '<|asr|> <|sos|> ~speech <|eos|> <|sot|> text <|eot|>'),
    'tts':         ('turn',   '<|tts|> <|sot|> ~text <|eot|> <|sos|> speech <|eos|>'),
    'half_duplex': ('turns',  {'user':      '<|sos|> ~speech <|eos|> <|sot|> text <|eot|>',
                               'assistant': '<|sot|> text <|eot|> <|sos|> speech <|eos|>'}),
    'duplex3':     ('chunks', '~user.speech 10, assistant.text 2, assistant.speech 10'),
    'duplex2':     ('chunks', '~user.speech 10, assistant.speech 10'),
    # duplex3 in two other ways (runs/claims.sh): the user is learned, too; silence has its codes
    'duplex3_user': ('chunks', 'user.speech 10, assistant.text 2, assistant.speech 10'),
    'duplex3_real': ('chunks', '~user.speech 10, assistant.text 2, assistant.speech@real 10'),

    # what was said, without a sound: a model of text to start from, or so that speech does not displace it
    'text':        ('turns',  {'user':      '<|user|> text <|eot|>',
                               'assistant': '<|assistant|> text <|eot|>'}),

    # the neighbours; what each leaves out or adds stands in docs/layouts.md
    'blsp':        ('pair',   '~"###[Human]:" ~prompt ~user.speech ~"\n\n\n###[Assistant]:" assistant.text '
                              '<|endoftext|>'),
    'salm':        ('turn',   '~<|im_start|> ~"user\n" ~prompt ~speech ~<|im_end|> ~"\n" '
                              '<|im_start|> "assistant\n" text <|im_end|> "\n"'),
    'usdm_pretrain': ('segments', 'text, speech 10000ms, <|continue|> <|correspond|> <|endoftext|>'),
    'usdm_sft':    ('pair',   '~"Below is a conversation between the user and the agent. Each turn includes '
                              "the user's speech and its corresponding transcript, along with the agent's "
                              'response text and the corresponding speech.\n\n### User\n" ~user.speech '
                              '~<|correspond|> user.text "\n" ~"### Agent\n" assistant.text <|correspond|> '
                              'assistant.speech <|eos|> ~"\n"'),
    'glm4voice':   ('turns',  {'start':     '~<|system|> ~"\n" ~prompt ~<|user|>',
                               'user':      '~"\n" ~<|begin_of_audio|> ~speech ~<|end_of_audio|>',
                               'assistant': '~<|assistant|> ~"streaming_transcription\n" '
                                            '[text 13 : speech 26] <|user|>'}),
    'mini_omni':   ('pair',   '~<|sos|> ~user.speech ~<|eos|> ~<|answer|> '
                              '[assistant.text | assistant.speech +1 +2 +3 +4 +5 +6 +7]'),
    'mini_omni2_irq': ('chunks', '~user.speech 1, state'),
    'outetts':     ('turn',   '<|im_start|> "\n" <|text_start|> {word / <|text_sep|>} <|text_end|> "\n" '
                              '<|audio_start|> "\n" {word duration <|code_start|> speech <|code_end|> "\n"} '
                              '<|audio_end|> "\n" <|im_end|> "\n"'),
    'outetts3':    ('turn',   '<|im_start|> "\n" <|text_start|> text <|text_end|> "\n" <|audio_start|> "\n" '
                              '{<|word_start|> word <|features|> duration <|code|> speech +0 +0 '
                              '<|word_end|> "\n"} <|audio_end|> "\n" <|im_end|> "\n"'),
    'syncllm':     ('chunks', '<|assistant|> assistant.speech@dedup 160ms <|user|> user.speech@dedup 160ms'),
    'moshi':       ('chunks', 'assistant.text@word 1, assistant.speech@real 80ms +0 +1 +1 +1 +1 +1 +1 +1, '
                              '~user.speech 80ms +0 +1 +1 +1 +1 +1 +1 +1'),
    'nemo_duplex': ('chunks', 'assistant.text@turn 1, assistant.speech@turn 80ms +1, ~user.speech 80ms'),
}

DURATIONS = [f'<|t_{i / 100:.2f}|>' for i in range(1001)]   # of a word, in seconds, up to 10
KINDS = ('speech', 'text', 'word', 'duration', 'prompt', 'state')
WAYS = {
    'speech@real':  "the assistant's channel as it was recorded, its silence too",
    'speech@turn':  'as recorded, with <|sos|> and <|eos|> where text@turn has <|begin|> and <|eot|>',
    'speech@dedup': 'of equal codes in a row a chunk has one only; unflatten repeats codes to fill the chunk',
    'text@turn':    'begins with <|begin|> where its turn does, ends with <|eot|> where that ends',
    'text@word':    'each word begins where it is said, <|epad|> announces it after silence',
}
TOKEN = re.compile(r'''[\s,]*(?: (?P<bracket> [][{}:|/]) | (?P<fed> ~?) (?:
    (?P<literal> "[^"]*") | (?P<control> <\|[^|>]+\|>)
    | (?P<stream> [a-z_.]+ (?:@[a-z]+)?) (?:\ (?P<n> \d+)(?P<unit> ms)?)?
      (?P<delays> (?:\s*\+\d+)*) ))''', re.X)


class Slot(NamedTuple):
    what: str           # a control token, a literal in quotes, or a stream: user.speech, assistant.text, …
    kind: str           # one of KINDS, 'literal', or the control token itself
    role: str           # 'user' or 'assistant'; '' for whoever has the turn
    way: str            # what stands behind @
    n: int              # tokens a chunk, of speech frames; 0: as many as the turn has
    learned: bool
    delays: tuple = ()  # steps by which each code of a frame is late
    ms: int = 0         # n as time, if it was given so


class Group(NamedTuple):
    """What stands in brackets."""
    kind: str           # '[:' portions, '[|' rows, '{' words
    parts: list         # lists of slots: those between the separators


@dataclass(frozen=True)
class Layout:
    name: str
    order: str
    slots: dict         # role -> [Slot or Group]; in chunks, pairs and segments both roles have the same list
    learn_user_text: bool = True
    codes_per_frame: int = 1        # these two are the codec's: see bind
    rate_hz: float = 25.0

    @cached_property
    def chunk(self):
        return self.slots['assistant'] if self.order == 'chunks' else []

    @cached_property
    def sizes(self):
        """tokens of each slot of a chunk"""
        return [slot.n * (self.codes_per_frame if slot.kind == 'speech' else 1) for slot in self.chunk]

    @cached_property
    def is_ragged(self):
        """Do chunks differ in length?"""
        return any(slot.way == 'dedup' for slot in self.chunk)

    @cached_property
    def period(self):
        return 0 if self.is_ragged else sum(self.sizes)     # tokens a chunk; 0 where there are no such chunks

    @cached_property
    def learned(self):
        return [slot.learned for slot, size in zip(self.chunk, self.sizes) for _ in range(size)]    # [K]

    @cached_property
    def speech_chunk(self):
        return next((slot.n for slot in self.all_slots() if slot.kind == 'speech'), 0)  # frames a chunk

    @cached_property
    def text_chunk(self):
        return next((slot.n for slot in self.all_slots() if slot.kind == 'text'), 0)    # text tokens a chunk

    @cached_property
    def n_late(self):
        return max((delay for slot in self.chunk for delay in slot.delays), default=0)

    def n_chunk(self, n_frame):
        """Chunks of a dialogue of n_frame frames; what is laid late adds some."""
        return -(-n_frame // self.speech_chunk) + self.n_late if n_frame else 0

    def all_slots(self, *roles):
        """Those in groups, too; of all roles, or of these."""
        def walk(items):
            for item in items:
                yield from [item] if isinstance(item, Slot) else walk(sum(item.parts, []))
        return [slot for role in roles or self.slots for slot in walk(self.slots[role])]

    @cached_property
    def spoken(self):
        """role -> the slots of speech in its line"""
        return {role: [slot for slot in self.all_slots(role) if slot.kind == 'speech'] for role in self.slots}

    def has_speech_of(self, role):
        return any((slot.role or line) == role for line, slots in self.spoken.items() for slot in slots)

    @cached_property
    def is_voice(self):
        """Is it for saying a text? Then the speech of a turn is learned, and the text known."""
        return self.order == 'turn' and all(slot.learned for slots in self.spoken.values() for slot in slots)

    @cached_property
    def has_state(self):
        return any(slot.kind == 'state' for slot in self.all_slots())

    @cached_property
    def needs_words(self):
        return self.order == 'segments' or any(slot.way == 'word' or slot.kind == 'word'
                                               for slot in self.all_slots())

    @cached_property
    def control(self):
        """Names of the control tokens that occur."""
        names = [slot.what for slot in self.all_slots() if slot.what.startswith('<|')]
        names += ['<|begin|>'] * any(slot.what.endswith('text@turn') for slot in self.all_slots())
        names += ['<|epad|>'] * any(slot.way == 'word' for slot in self.all_slots())
        names += ['<|irq|>', '<|n-irq|>'] * self.has_state
        names += DURATIONS * any(slot.kind == 'duration' for slot in self.all_slots())
        return list(dict.fromkeys(names))

    def settings(self):
        """-> a dict; get_layout(**settings) makes this layout again"""
        return dict(name=self.name, speech_chunk=self.speech_chunk or None,
                    text_chunk=self.text_chunk or None, learn_user_text=self.learn_user_text,
                    codes_per_frame=self.codes_per_frame, rate_hz=self.rate_hz)

    def bind(self, codec):
        """-> this layout for data of that codec (what codec.describe() says). Raises ValueError where the
        layout has rows for more or fewer codes a frame."""
        n_code, rate_hz = codes_per_frame(codec), codec['rate_hz']
        for slot in self.all_slots():
            if len(slot.delays) not in (0, 1, n_code):
                raise ValueError(f'layout {self.name} has {len(slot.delays)} codes a frame, the codec '
                                 f'{codec["name"]} has {n_code}')
            if slot.way == 'dedup' and n_code > 1:
                raise ValueError(f'layout {self.name} is for one code a frame, the codec {codec["name"]} has '
                                 f'{n_code}')

        def fit(items):
            return [item._replace(parts=list(map(fit, item.parts))) if isinstance(item, Group) else
                    item._replace(n=max(1, round(item.ms / 1000 * rate_hz))) if item.ms else item
                    for item in items]
        return replace(self, slots={role: fit(items) for role, items in self.slots.items()},
                       codes_per_frame=n_code, rate_hz=rate_hz)


def get_layout(name, speech_chunk=None, text_chunk=None, learn_user_text=True, codes_per_frame=None,
               rate_hz=25.0, table=LAYOUTS):
    """
    The layout of that name; 'asr.user' or 'tts.assistant' takes the turns of one role only. Raises ValueError
    for an unknown name, a chunk size below 1 or a line that cannot be read.
    speech_chunk, text_chunk: frames and text tokens a chunk; None: as many as LAYOUTS says
    learn_user_text: does half_duplex learn what the user says, as a recognition task; the paper doesn't say
    codes_per_frame, rate_hz: of the codec, see Layout.bind; None: as many as the layout has rows for
    """
    name, _, only_role = name.partition('.')
    if name not in table:
        near = difflib.get_close_matches(name, table, 1, 0)[0]
        raise ValueError(f'no layout {name!r}; did you mean {near!r}? (known: {", ".join(table)})')
    order, lines = table[name]
    if only_role and (only_role not in ROLES or order not in ('turn', 'segments')):
        raise ValueError(f'no layout {name}.{only_role}: a role, {" or ".join(ROLES)}, goes with layouts '
                         'whose documents are single turns')
    sizes = {'speech': speech_chunk, 'text': text_chunk}
    for kind, n in sizes.items():
        if n is not None and n < 1:
            raise ValueError(f'{kind}_chunk is {n}: a chunk holds at least one {kind} token')
    slots = {}
    for role in lines if isinstance(lines, dict) else [only_role] if only_role else ROLES:
        items = parse(lines[role] if isinstance(lines, dict) else lines, name)

        def fit(slot, role=role):
            if isinstance(slot, Group):
                return slot._replace(parts=[[fit(each) for each in part] for part in slot.parts])
            if order == 'chunks' and slot.kind not in sizes:
                slot = slot._replace(n=1)
            if slot.n and sizes.get(slot.kind):
                slot = slot._replace(n=sizes[slot.kind], ms=0)
            is_the_users = (slot.role or role, slot.kind) == ('user', 'text') and order in ('turns', 'pair')
            return slot._replace(learned=slot.learned and (learn_user_text or not is_the_users))
        slots[role] = list(map(fit, items))
    layout = Layout(name + ('.' + only_role if only_role else ''), order, slots, learn_user_text)
    if codes_per_frame is None:
        codes_per_frame = max([1, *(len(slot.delays) for slot in layout.all_slots())])
    return layout.bind(dict(name='given', levels=[codes_per_frame], rate_hz=rate_hz))


def parse(line, name):
    """A line of LAYOUTS -> [Slot or Group]. Raises ValueError where it cannot be read."""
    stack, at = [('', [[]])], 0         # of groups that are open, the line itself first: (bracket, parts)
    while at < len(line.rstrip(' ,')):
        match = TOKEN.match(line, at)
        if not match:
            raise ValueError(f'layout {name}: {line[at:at + 20].strip()!r} is no slot')
        at, bracket = match.end(), match['bracket']
        if not bracket:
            stack[-1][1][-1].append(parse_slot(match, name))
        elif bracket in '[{':
            stack.append((bracket, [[]]))
        elif bracket in ':|/':
            stack[-1] = (stack[-1][0] + bracket, stack[-1][1] + [[]])
        else:
            kind, parts = stack.pop()
            kind = kind.strip('/')[:2]
            is_right = kind + bracket in ('[:]', '[|]', '{}') and all(parts)
            if kind != '{':     # one stream in each part; portions say how many
                is_right &= all(len(part) == 1 and (part[0].n or kind == '[|') for part in parts)
            if not is_right:
                raise ValueError(f'layout {name}: the bracket before {line[at:at + 20]!r} is none of '
                                 '[text 13 : speech 26], [text | speech +1], {word <|sep|> speech}')
            stack[-1][1][-1].append(Group(kind, parts))
    if len(stack) > 1 or len(stack[0][1]) > 1:
        raise ValueError(f'layout {name}: a bracket is missing in {line!r}')
    return stack[0][1][0]


def parse_slot(match, name):
    stream, is_fed, n = match['stream'] or '', bool(match['fed']), int(match['n'] or 0)
    if not stream:
        literal, control = match['literal'], match['control']
        return Slot(literal or control, 'literal' if literal else control, '', '', 0, not is_fed)
    role, _, rest = stream.rpartition('.')
    kind, _, way = rest.partition('@')
    if role not in ('', *ROLES) or kind not in KINDS:
        raise ValueError(f'layout {name}: nothing is called {stream!r}; streams are {", ".join(KINDS)}, of '
                         'user. or assistant. or of whoever speaks')
    if way and rest not in WAYS:
        raise ValueError(f'layout {name}: {rest} is unknown; known are {", ".join(WAYS)}')
    delays = tuple(int(delay) for delay in re.findall(r'\d+', match['delays']))
    n, ms = (1, n) if match['unit'] else (n, 0)
    return Slot(stream, kind, role, way, n, not is_fed, delays, ms)
