"""Settings: what nanoGPT's configurator took in silence ends here with a sentence."""
from dataclasses import dataclass

import pytest

import config
import train


@dataclass(frozen=True)
class Config:
    learning_rate: float = 1e-3     # how fast
    batch_size: int = 4
    compile: bool = False
    out_dir: str = 'out'
    chunk: int | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError('batch_size has to be at least 1')


def test_files_then_command_line(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('import math\n_rows = 2\nbatch_size = _rows * 8     # 16\n'
                    'learning_rate = 1\nchunk = None\n')
    arguments = ['--learning_rate=1e-4', '--compile=true', '--out_dir=a=b', '--chunk=5']
    assert config.load(Config, [str(path), *arguments]) == Config(1e-4, 16, True, 'a=b', 5)


@pytest.mark.parametrize('argument, expected', [
    ('--learning_rate=1', dict(learning_rate=1.0)),
    ('--batch_size=1e3', dict(batch_size=1000)),
    ('--compile=false', dict(compile=False)),
    ('--compile=True', dict(compile=True)),
    ('--chunk=None', dict(chunk=None)),
    ('--chunk=none', dict(chunk=None)),
    ('--out_dir=2024', dict(out_dir='2024')),
])
def test_values(argument, expected):
    assert config.load(Config, [argument]) == Config(**expected)


@pytest.mark.parametrize('argument, message', [
    ('--lerning_rate=1', "no setting 'lerning_rate'; did you mean 'learning_rate'?"),
    ('--batch_size=six', "batch_size has to be int, not str 'six'"),
    ('--batch_size=1.5', 'batch_size has to be int, not float 1.5'),
    ('--batch_size=true', 'batch_size has to be int, not bool True'),
    ('--chunk=x', "chunk has to be int or None, not str 'x'"),
    ('--compile', '--compile: settings are given as --compile=VALUE'),
    ('--batch_size=0', 'batch_size has to be at least 1'),
    ('nowhere.py', 'no config file nowhere.py'),
])
def test_refused(argument, message):
    with pytest.raises(SystemExit) as error:
        config.load(Config, [argument])
    assert message in str(error.value) and '\n' not in str(error.value)


def test_unknown_name_in_a_file(tmp_path):
    (tmp_path / 'a.py').write_text('batch_sise = 4\n')
    message = "a.py: batch_sise = 4: no setting 'batch_sise'; did you mean 'batch_size'"
    with pytest.raises(SystemExit, match=message):
        config.load(Config, [str(tmp_path / 'a.py')])


def test_saved_settings_run_again(tmp_path):
    arguments = ['--stages=asr+tts:3, duplex3:4', '--learning_rate=3e-4', '--init_from=x']
    cfg = config.load(train.Config, arguments)
    config.save(cfg, tmp_path / 'config.py')
    assert config.load(train.Config, [str(tmp_path / 'config.py')]) == cfg


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_help_shows_settings_with_their_remarks(run, script):
    out = run(script, '--help').stdout
    assert f'python {script}' in out and 'seed: int = 1337' in out
    assert '# auto: a GPU if there is one' in out.replace('cuda, cpu, …; ', '')
