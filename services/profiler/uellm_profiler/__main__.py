"""``python -m uellm_profiler``."""

from uellm.service import main
from uellm_profiler.app import start
from uellm_profiler.settings import ProfilerSettings

if __name__ == "__main__":
    main(ProfilerSettings, start)
