"""``python -m uellm_gateway``."""

from uellm.service import main
from uellm_gateway.app import start
from uellm_gateway.settings import GatewaySettings

if __name__ == "__main__":
    main(GatewaySettings, start)
