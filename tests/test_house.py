"""How the code is laid out: imports run one way, functions fit on a screen or two, the core stays small."""
import ast

from conftest import ROOT

# each floor imports from those above its line here, and from its own as long as no circle comes of it
FLOORS = [
    ['config', 'common', 'vocabulary', 'layouts'],
    ['flatten', 'clock', 'templates', 'model', 'rows', 'codec'],
    ['data'],
    ['decode', 'table', 'respond', 'parallel', 'card', 'checkpoint', 'guard'],
    ['measures'],
    ['inputs', 'live'],
    ['train', 'grpo', 'sample', 'evaluate', 'bench', 'talk', 'hub'],    # imported by nobody
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    """{'data.loader': its path} of all that is ours, tests left out."""
    found = {}
    for name in FLOOR:
        for path in [ROOT / f'{name}.py', *(ROOT / name).rglob('*.py')]:
            if path.is_file():
                parts = path.relative_to(ROOT).with_suffix('').parts
                found['.'.join(parts).removesuffix('.__init__')] = path
    return found


def imports(path, known):
    """Names of our modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found & known


def test_imports_run_one_way():
    files = modules()
    arrows = {name: imports(path, files.keys()) for name, path in files.items()}
    assert len(arrows) > 30
    for name, others in arrows.items():
        for other in others:
            here, there = FLOOR[name.split('.')[0]], FLOOR[other.split('.')[0]]
            assert there <= here and there < len(FLOORS) - 1, f'{name} imports {other}, which stands above it'
            assert 'prepare' not in other, f'{name} imports the script {other}'


def test_there_is_no_circle():
    files = modules()
    left = {name: imports(path, files.keys()) - {name} for name, path in files.items()}
    while left:
        ground = {name for name, others in left.items() if not others & left.keys()}
        assert ground, f'a circle among {", ".join(sorted(left))}'
        left = {name: others for name, others in left.items() if name not in ground}


def test_no_path_is_patched():
    for name, path in modules().items():
        if name != 'codec.cosyvoice_worker':       # which runs in CosyVoice's own environment
            text = path.read_text(encoding='utf-8')
            assert 'sys.path' not in text, f'{name} changes sys.path; pip install -e . does that'


def test_no_function_is_over_80_lines():
    for path in [*modules().values(), *(ROOT / 'tests').glob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_line = node.end_lineno - node.lineno + 1
                assert n_line <= 80, f'{path.name}: {node.name} has {n_line} lines'


CORE = ('train.py', 'model.py', 'flatten.py', 'sample.py', 'decode.py', 'data/loader.py', 'vocabulary.py',
        'codec/__init__.py')


def test_the_core_stays_small():
    """What a reader goes through to understand the whole of training and decoding, comments included."""
    assert sum(len((ROOT / name).read_text(encoding='utf-8').splitlines()) for name in CORE) < 2900
