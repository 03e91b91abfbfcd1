"""Property tests have no deadline: on a busy machine it would measure the others' work."""

from hypothesis import settings

settings.register_profile("leyden", deadline=None)
settings.load_profile("leyden")
