"""ARC tasks: read from files, or made from programs that are known; validated, augmented, packed into batches."""

from intaglio.data.arc.generate import generate
from intaglio.data.arc.read import read_tasks, refuse_leak
from intaglio.data.arc.tasks import Pair, Task, TaskCorpus

__all__ = ["Pair", "Task", "TaskCorpus", "generate", "read_tasks", "refuse_leak"]
