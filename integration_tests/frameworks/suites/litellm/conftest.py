from integration_tests.frameworks.suites.openai.conftest import gateway, installed, servers, user_server

__all__ = ["gateway", "installed", "servers", "user_server"]
