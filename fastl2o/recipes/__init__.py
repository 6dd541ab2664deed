"""Recipes that come with fastl2o: one TOML file a shipped rule, see `fastl2o.meta.recipe`."""
