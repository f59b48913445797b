"""``python -m uellm_deployer``."""

from uellm.service import main
from uellm_deployer.app import start
from uellm_deployer.settings import DeployerSettings

if __name__ == "__main__":
    main(DeployerSettings, start)
