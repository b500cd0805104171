"""`lorainit.offset`: the offset form under the name that messages, documents and pickled models give it."""

from .adapter.offset import *  # noqa: F403
