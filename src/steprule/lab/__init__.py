"""The command line, and the classes for a task of your own.

`steprule train --task FILE.py:function` trains what `function()` returns: a `Task`.
"""

from steprule.lab.tasks import Score, Task, accuracy

__all__ = ["Score", "Task", "accuracy"]
