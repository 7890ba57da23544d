{{/* Rules that span values: each failure names its value and says what to do. */}}

{{- define "llm-extproc.rules" -}}
{{- include "llm-extproc.gatewayRules" . }}
{{- $values := .Values }}
{{- if and $values.autoscaling.hpa.enabled $values.autoscaling.keda.enabled }}
{{- fail "autoscaling.keda.enabled: not beside autoscaling.hpa.enabled, choose one of them" }}
{{- end }}
{{- if and $values.monitoring.serviceMonitor.enabled $values.monitoring.podMonitor.enabled }}
{{- fail "monitoring.podMonitor.enabled: not beside monitoring.serviceMonitor.enabled, or each pod is scraped twice" }}
{{- end }}
{{- $isScraped := or $values.monitoring.serviceMonitor.enabled $values.monitoring.podMonitor.enabled }}
{{- if and $values.networkPolicy.enabled $isScraped (not $values.networkPolicy.monitoring) }}
{{- fail "networkPolicy.monitoring: name the peers of Prometheus, or the policy keeps it from the metrics" }}
{{- end }}
{{- range $name, $scaler := $values.autoscaling }}
{{- if and $scaler.enabled (gt (int $scaler.minReplicas) (int $scaler.maxReplicas)) }}
{{- fail (printf "autoscaling.%s.maxReplicas: less than minReplicas" $name) }}
{{- end }}
{{- end }}
{{- if and $values.autoscaling.keda.enabled (not (hasPrefix "http" $values.autoscaling.keda.prometheusAddress)) }}
{{- fail "autoscaling.keda.prometheusAddress: needed, the URL of the Prometheus that has the metrics" }}
{{- end }}
{{- if and $values.tls (eq $values.mode "gateway") }}
{{- fail "tls: not with mode: gateway, where Envoy and the service share a Unix socket" }}
{{- end }}
{{- if eq $values.mode "gateway" }}
{{- $heap := int64 (default 0 (get (default dict $values.config.envoy) "max_heap_mb")) }}
{{- if gt (mul 2 $heap) (int64 $values.gateway.memoryMib) }}
{{- fail (printf "gateway.memoryMib: must be at least twice config.envoy.max_heap_mb (%d), since bodies on their way come on top" $heap) }}
{{- end }}
{{- end }}
{{- $pool := $values.gatewayObjects.inferencePool }}
{{- $route := $values.gatewayObjects.httpRoute }}
{{- range $name, $object := $values.gatewayObjects }}
{{- if and $object.enabled (or (ne $values.mode "service") (ne $values.config.discovery.backend "inference_pool")) }}
{{- fail (printf "gatewayObjects.%s.enabled: only with mode: service and config.discovery.backend: inference_pool" $name) }}
{{- end }}
{{- end }}
{{- if and $pool.enabled (empty $pool.matchLabels) }}
{{- fail "gatewayObjects.inferencePool.matchLabels: needed, or the pool would have all pods of the namespace" }}
{{- end }}
{{- if and $pool.enabled (ne (include "llm-extproc.followedNamespace" .) .Release.Namespace) }}
{{- fail (printf "config.discovery.inference_pool.namespace: must be that of the release, %s, since a pool names an endpoint picker in its own namespace" .Release.Namespace) }}
{{- end }}
{{- if and $pool.enabled (eq $pool.failureMode "FailOpen") (include "llm-extproc.needsDecisions" .) }}
{{- fail "gatewayObjects.inferencePool.failureMode: must be FailClose with several models, or with prefill and decode workers: without a decision a request would reach a wrong worker" }}
{{- end }}
{{- if and $route.enabled (empty $route.parentRefs) }}
{{- fail "gatewayObjects.httpRoute.parentRefs: needed, the Gateways that have the route" }}
{{- end }}
{{- $names := list }}
{{- range $index, $tokenizer := $values.tokenizers }}
{{- if has $tokenizer.name $names }}
{{- fail (printf "tokenizers[%d].name: %q is given twice" $index $tokenizer.name) }}
{{- end }}
{{- $names = append $names $tokenizer.name }}
{{- end }}
{{- $mounts := list }}
{{- range $values.extraVolumeMounts }}{{ $mounts = append $mounts .mountPath }}{{ end }}
{{- range $index, $model := $values.config.models }}
{{- $path := default "" $model.tokenizer_path }}
{{- $known := or (empty $path) (has (index (splitList "/" (trimPrefix "/models/" $path)) 0) $names) }}
{{- range $mounts }}{{ if hasPrefix . $path }}{{ $known = true }}{{ end }}{{ end }}
{{- if not $known }}
{{- fail (printf "config.models[%d].tokenizer_path: %s is on no volume; it must be /models/ and the name of an entry of tokenizers, or within a mount of extraVolumeMounts" $index $path) }}
{{- end }}
{{- end }}
{{- if gt (int (include "llm-extproc.tokenModels" .)) 0 }}
{{- $pages := int64 (include "llm-extproc.pages" .) }}
{{- if gt $pages (int64 (include "llm-extproc.maxPages" .)) }}
{{- fail (printf "config.kv.max_pages: less than the %d pages that follow from sizing; leave it out and the chart sets it" $pages) }}
{{- end }}
{{- if gt (int64 (include "llm-extproc.openFiles" .)) (int64 $values.sizing.openFilesMax) }}
{{- fail (printf "sizing.openFilesMax: this fleet needs %s open files; raise the limit of the container runtime, then this value" (include "llm-extproc.openFiles" .)) }}
{{- end }}
{{- end }}
{{- $ports := dict }}
{{- range $key, $port := dict "server.port" (include "llm-extproc.grpcPort" .) "server.admin_port" (include "llm-extproc.adminPort" .) "envoy.port" (include "llm-extproc.envoyPort" .) "envoy.admin_port" (include "llm-extproc.envoyAdminPort" .) }}
{{- if hasKey $ports $port }}
{{- fail (printf "config.%s: %s is already the value of %s" $key $port (get $ports $port)) }}
{{- end }}
{{- $_ := set $ports $port $key }}
{{- end }}
{{- if and (not $values.serviceAccount.create) (not $values.serviceAccount.name) (include "llm-extproc.followsCluster" .) $values.rbac.create }}
{{- fail "serviceAccount.name: needed without serviceAccount.create, or the account default would get the rights of discovery" }}
{{- end }}
{{- $step := float64 (include "llm-extproc.defaultOf" (list . "server" "step_deadline_secs" 5)) }}
{{- if ge $step (float64 (include "llm-extproc.defaultOf" (list . "envoy" "message_timeout_secs" 10))) }}
{{- fail "config.server.step_deadline_secs: must be shorter than config.envoy.message_timeout_secs" }}
{{- end }}
{{- include "llm-extproc.policyRules" . }}
{{- end }}
