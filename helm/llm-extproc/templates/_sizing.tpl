{{/* Memory, open files and times, computed from `sizing` and `config`. */}}

{{/* Pages that the workers can hold. */}}
{{- define "llm-extproc.pages" -}}
{{- $sizing := .Values.sizing }}
{{- $perWorker := ceil (divf (float64 $sizing.kvTokensPerWorker) (float64 $sizing.pageSize)) }}
{{- int64 (mulf $perWorker (float64 $sizing.workers)) }}
{{- end }}

{{/* The limit of the index: a quarter more than the workers hold. */}}
{{- define "llm-extproc.maxPages" -}}
{{- $own := include "llm-extproc.defaultOf" (list . "kv" "max_pages" 0) }}
{{- if ne $own "0" }}{{ $own }}
{{- else }}{{ max 1000 (div (mul (int64 (include "llm-extproc.pages" .)) 5) 4) }}
{{- end }}
{{- end }}

{{/* MiB without the index: the process, a tokenizer and a cache for each model, open requests. */}}
{{- define "llm-extproc.baseMebibytes" -}}
{{- $models := int (include "llm-extproc.tokenModels" .) }}
{{- $cache := int64 (include "llm-extproc.defaultOf" (list . "tokenization" "cache_bytes" 134217728)) }}
{{- $requests := int64 (include "llm-extproc.defaultOf" (list . "server" "max_requests" 10000)) }}
{{- add 192 (mul $models (add 160 (div $cache 1048576))) (div (mul $requests 21) 1024) }}
{{- end }}

{{- define "llm-extproc.memoryRequest" -}}
{{- if .Values.resources.memoryRequest }}{{ .Values.resources.memoryRequest }}
{{- else }}
{{- $index := 0 }}
{{- if gt (int (include "llm-extproc.tokenModels" .)) 0 }}
{{- $index = div (mul (int64 (include "llm-extproc.pages" .)) 250) 1048576 }}
{{- end }}
{{- printf "%dMi" (add (int64 (include "llm-extproc.baseMebibytes" .)) $index) }}
{{- end }}
{{- end }}

{{/* The index at its limit, and bodies at theirs, which take up to three times their size. */}}
{{- define "llm-extproc.memoryLimit" -}}
{{- if .Values.resources.memoryLimit }}{{ .Values.resources.memoryLimit }}
{{- else }}
{{- $index := 0 }}
{{- if gt (int (include "llm-extproc.tokenModels" .)) 0 }}
{{- $index = div (mul (int64 (include "llm-extproc.maxPages" .)) 250) 1048576 }}
{{- end }}
{{- $bodies := int64 (include "llm-extproc.defaultOf" (list . "server" "max_buffered_bytes" 536870912)) }}
{{- $base := div (mul (int64 (include "llm-extproc.baseMebibytes" .)) 5) 4 }}
{{- printf "%dMi" (add $base $index (mul 3 (div $bodies 1048576))) }}
{{- end }}
{{- end }}

{{/* Open files: six for each rank, two for each worker, and what the process reserves. */}}
{{- define "llm-extproc.openFiles" -}}
{{- $sizing := .Values.sizing }}
{{- $ranks := mul (int64 $sizing.workers) (int64 $sizing.ranksPerWorker) }}
{{- add 2048 1024 (mul 6 $ranks) (mul 2 (int64 $sizing.workers)) }}
{{- end }}

{{/* Seconds that a pod has to end: what precedes SIGTERM, the drain, the longest prefill, a margin. */}}
{{- define "llm-extproc.graceSecs" -}}
{{- if not (kindIs "invalid" .Values.graceSecs) }}{{ int64 .Values.graceSecs }}
{{- else }}
{{- $drain := ceil (float64 (include "llm-extproc.defaultOf" (list . "server" "drain_secs" 10))) }}
{{- $prefill := ceil (float64 (include "llm-extproc.defaultOf" (list . "pd" "prefill_timeout_secs" 90))) }}
{{- $envoy := ternary (int64 .Values.gateway.drainSecs) 0 (eq .Values.mode "gateway") }}
{{- add (int64 .Values.preStopSecs) $envoy (int64 $drain) (int64 $prefill) 10 }}
{{- end }}
{{- end }}
