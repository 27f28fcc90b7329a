"""The command line, and the classes for a task and for a training loop of your own.

`steprule train --task FILE.py:function` trains what `function()` returns: a `Task`. `Logger` keeps the numbers
of your own loop for `steprule report`.
"""

from steprule.lab.logger import Logger
from steprule.lab.tasks import Score, Task, accuracy

__all__ = ["Logger", "Score", "Task", "accuracy"]
