package routes.GET.public.documents.__id

import rego.v1

default allowed := true
