"""What tests of Leyden and of its plugins share: fakes, and one contract suite a kind of plugin."""
