"""The page of `fp8gate report`: the verdict, the maps, their numbers, the models' layers, provenance and quality."""
