"""Back into the app: export folders, and routing roles to what was trained."""
