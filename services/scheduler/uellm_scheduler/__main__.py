"""``python -m uellm_scheduler``."""

from uellm.service import main
from uellm_scheduler.app import start
from uellm_scheduler.settings import SchedulerSettings

if __name__ == "__main__":
    main(SchedulerSettings, start)
